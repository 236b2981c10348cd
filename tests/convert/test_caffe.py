"""Networks under Caffe's layer names: the same scores as ours after conversion."""

import pytest
import torch
import torch.nn.functional as F

from fastseg import convert, models
from fastseg.nn import CRFRNN

from .layouts import Source, caffe_vgg, flip, pool, resize

WIDTH, HIDDEN, CLASSES = 4, 8, 3
TINY = {"num_classes": CLASSES, "width": WIDTH, "hidden": HIDDEN}


def fc(w, x, *, k, padding=0, dilation=1, suffix="", score):
    x = F.relu(w.conv(x, f"fc6{suffix}", HIDDEN, k, padding=padding, dilation=dilation))
    x = F.relu(w.conv(x, f"fc7{suffix}", HIDDEN, 1))
    return w.conv(x, score, CLASSES, 1)


def deconv(w, x, name, stride, *, trained=False):
    k = 2 * stride
    ramp = 1 - ((torch.arange(k) - (stride - 0.5)) / stride).abs().double()
    if f"{name}.weight" not in w:
        w[f"{name}.weight"] = torch.zeros(CLASSES, CLASSES, k, k, dtype=torch.float64)
        w[f"{name}.weight"][range(CLASSES), range(CLASSES)] = torch.outer(ramp, ramp)
        if trained:
            w[f"{name}.weight"] += 0.01 * torch.randn(CLASSES, CLASSES, k, k)
    return F.conv_transpose2d(x, w[f"{name}.weight"], stride=stride)


def crop(x, offset, like):
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


def fcn8s(w, x, **up):
    _, _, pool3, pool4, pool5 = caffe_vgg(w, x, WIDTH, first=100)
    y = deconv(w, fc(w, pool5, k=7, score="score_fr"), "upscore2", 2, **up)
    y = y + crop(w.conv(pool4, "score_pool4", CLASSES, 1), 5, y)
    y = deconv(w, y, "upscore_pool4", 2, **up)
    y = y + crop(w.conv(pool3, "score_pool3", CLASSES, 1), 9, y)
    return crop(deconv(w, y, "upscore8", 8, **up), 31, x)


def fcn16s(w, x):
    *_, pool4, pool5 = caffe_vgg(w, x, WIDTH, first=100)
    y = deconv(w, fc(w, pool5, k=7, score="score_fr"), "upscore2", 2)
    y = y + crop(w.conv(pool4, "score_pool4", CLASSES, 1), 5, y)
    return crop(deconv(w, y, "upscore16", 16), 27, x)


def fcn32s(w, x):
    *_, pool5 = caffe_vgg(w, x, WIDTH, first=100)
    return crop(deconv(w, fc(w, pool5, k=7, score="score_fr"), "upscore", 32), 19, x)


def dilated(w, x, final, context):
    x = F.pad(x, (186, 186, 186, 186), mode="reflect")
    keep = [pool(2, 2)] * 3 + [lambda x: x] * 2
    y = caffe_vgg(w, x, WIDTH, first=0, padding=0, dilation5=2, pools=keep)[-1]
    y = fc(w, y, k=7, dilation=4, score=final)
    if context:
        y = F.pad(y, (33, 33, 33, 33))
        widths, dilations = (2, 2, 4, 8, 16, 32, 32), (1, 1, 2, 4, 8, 16, 1)
        names = ("conv1_1", "conv1_2", "conv2_1", "conv3_1", "conv4_1", "conv5_1", "fc1")
        for name, width, d in zip(names, widths, dilations, strict=True):
            y = F.relu(w.conv(y, context + name, width * CLASSES, 3, dilation=d))
        y = w.conv(y, context + "final", CLASSES, 1)
    return y  # at cells 8 pixels apart


LARGEFOV = [pool(3, 2, 1)] * 3 + [pool(3, 1, 1)] * 2


def deeplabv1(w, x):
    y = caffe_vgg(w, x, WIDTH, dilation5=2, pools=LARGEFOV)[-1]
    y = fc(w, F.avg_pool2d(y, 3, 1, 1), k=3, padding=12, dilation=12, score="fc8_voc12")
    return resize(y, x, True)


def deeplabv2(w, x):
    y = caffe_vgg(w, x, WIDTH, dilation5=2, pools=LARGEFOV)[-1]
    y = sum(
        fc(w, y, k=3, padding=r, dilation=r, suffix=f"_{i}", score=f"fc8_voc12_{i}")
        for i, r in enumerate((6, 12, 18, 24), 1)
    )
    return resize(y, x, True)


CASES = {
    "fcn32s": (fcn32s, "fcn_caffe", models.fcn32s_vgg16, {"padding": "caffe"}),
    "fcn16s": (fcn16s, "fcn_caffe", models.fcn16s_vgg16, {"padding": "caffe"}),
    "fcn8s": (fcn8s, "fcn_caffe", models.fcn8s_vgg16, {"padding": "caffe"}),
    "trained upsampling": (
        lambda w, x: fcn8s(w, x, trained=True),
        "fcn_caffe",
        models.fcn8s_vgg16,
        {"padding": "caffe", "upsample": "dense"},
    ),
    "largefov": (deeplabv1, "deeplabv1_caffe", models.deeplabv1_largefov_vgg16, {}),
    "deeplabv2": (deeplabv2, "deeplabv2_caffe", models.deeplabv2_vgg16, {}),
}


def test_crfrnn():
    source, x = Source(), torch.randn(2, 3, 41, 57, dtype=torch.float64)
    scores = fcn8s(source, flip(x), trained=True)
    source["upscore2.bias"] = torch.zeros(CLASSES, dtype=torch.float64)
    layer = CRFRNN(CLASSES).double().eval()
    for name, parameter in (
        ("spatial_ker_weights", layer.spatial_weight),
        ("bilateral_ker_weights", layer.bilateral_weight),
        ("compatibility_matrix", layer.compatibility),
    ):
        torch.nn.init.normal_(parameter)
        source[f"crfrnn.{name}"] = parameter.detach()
    model = models.crfrnn_fcn8s_vgg16(**TINY, mean=0.0, std=20.0).double().eval()
    report = convert.load(source, model)
    assert (report.layout, report.kept) == ("crfrnn", [])
    torch.testing.assert_close(model(x)["out"], layer(scores, 20 * x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_same_scores(case):
    forward, layout, build, options = CASES[case]
    source, x = Source(), torch.randn(2, 3, 41, 57, dtype=torch.float64)
    expected = forward(source, flip(x))
    model = build(**TINY, **options).double().eval()
    report = convert.load(source, model)
    assert report.layout == layout
    assert not report.kept
    out = model(x)["out"]
    # Our fixed kernels are exact; the restatement's are float32, as in the files.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("final", "context", "layout"),
    [
        ("fc-final", None, "dilation_frontend"),
        ("fc-final", "ct_", "dilation8"),
        ("final", "ctx_", "dilation8"),
    ],
)
def test_dilated(final, context, layout):
    source, x = Source(), torch.randn(1, 3, 192, 200, dtype=torch.float64)
    expected = dilated(source, flip(x), final, context)
    options = {"context": "large", "context_padding": "first"} if context else {"context": None}
    model = models.dilated8_vgg16(**TINY, **options).double().eval()
    assert convert.load(source, model).layout == layout
    torch.testing.assert_close(model(x)["out"][..., ::8, ::8], expected)


def test_bgr_is_a_choice():
    source, x = Source(), torch.randn(1, 3, 33, 41, dtype=torch.float64)
    expected = deeplabv1(source, x)
    model = models.deeplabv1_largefov_vgg16(**TINY).double().eval()
    convert.load(source, model, bgr=False)
    torch.testing.assert_close(model(x)["out"], expected)
    model.load_state_dict(convert.caffe(source, bgr=True))
    torch.testing.assert_close(model(flip(x))["out"], expected)
    assert convert.detect(source).mean[0] > convert.detect(source).mean[2]  # red first


def vgg16_fc(source, width, names=("fc6", "fc7", "fc8"), hidden=8):
    """Classifier VGG16 over 7 x 7 features, its fully connected layers stored as matrices."""
    caffe_vgg(source, torch.zeros(1, 3, 32, 32, dtype=torch.float64), width)
    for name, outs, ins in zip(
        names, (hidden, hidden, 10), (8 * width * 49, hidden, hidden), strict=True
    ):
        source.tensor(f"{name}.weight", outs, ins, scale=ins**-0.5)
        source.tensor(f"{name}.bias", outs, scale=0.1)
    return source


def test_classifier_layers_become_convolutions():
    source = vgg16_fc(Source(), WIDTH)
    model = models.fcn32s_vgg16(**TINY, padding="caffe").double().eval()
    report = convert.load(source, model)
    assert report.layout == "vgg16_caffe"
    assert report.kept == ["head.score.weight", "head.score.bias"]
    assert report.unused == ["fc8.weight", "fc8.bias"]
    features = torch.randn(2, 8 * WIDTH, 7, 7, dtype=torch.float64)
    y = F.relu(F.linear(features.flatten(1), source["fc6.weight"], source["fc6.bias"]))
    y = F.linear(y, source["fc7.weight"], source["fc7.bias"])
    torch.testing.assert_close(model.head[:4](features)[:, :, 0, 0], y)


@pytest.mark.parametrize(
    ("build", "options", "taps", "keep"),
    [
        (models.deeplabv1_largefov_vgg16, {"hidden": 2}, (0, 3, 6), 4),
        (models.deeplabv1_4x4_vgg16, {"hidden": 8}, (0, 2, 4, 6), 1),
        (models.deeplabv2_vgg16, {"hidden": 4}, (0, 3, 6), 2),
    ],
)
def test_classifier_layers_are_thinned_out(build, options, taps, keep):
    source = vgg16_fc(Source(), WIDTH)
    model = build(num_classes=CLASSES, width=WIDTH, **options)
    convert.load(source, model)
    fc6 = source["fc6.weight"].reshape(8, 8 * WIDTH, 7, 7)[::keep][:, :, taps][:, :, :, taps]
    fc7 = source["fc7.weight"].reshape(8, 8, 1, 1)[::keep, ::keep]
    for head in (getattr(model, "head", None) and [model.head]) or model.branches:
        torch.testing.assert_close(head.fc6.weight.double(), fc6, rtol=0, atol=1e-7)
        torch.testing.assert_close(head.fc6.bias.double(), source["fc6.bias"][::keep])
        torch.testing.assert_close(head.fc7.weight.double(), fc7, rtol=0, atol=1e-7)


def test_trained_upsampling_needs_a_network_that_has_it():
    source = Source()
    fcn8s(source, torch.zeros(1, 3, 8, 8, dtype=torch.float64), trained=True)
    model = models.fcn8s_vgg16(**TINY, padding="caffe")
    with pytest.raises(ValueError, match=r"not in the network: upscores\.0\.deconv\.weight \(upsc"):
        convert.load(source, model)
