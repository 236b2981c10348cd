"""Reading files, finding layouts, fitting, and what the errors say."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastseg import convert, models
from fastseg.convert.load import fit, thin
from fastseg.models.common import BilinearUpsample2d
from fastseg.predict import Predictor

from .layouts import Source
from .test_caffe import TINY, deeplabv1, vgg16_fc


def deeplab_source():
    source = Source()
    deeplabv1(source, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    return {k: v.float() for k, v in source.items()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin", ".safetensors"])
def test_files(tmp_path, suffix):
    source, path = deeplab_source(), tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        save_file({"module." + k: v for k, v in source.items()}, path)
    else:
        wrapped = {"module." + k: v for k, v in source.items()}
        torch.save({"epoch": 3, "state_dict": wrapped, "meta": {"lr": 0.1}}, path)
    assert convert.read(path).keys() == source.keys()
    model = models.deeplabv1_largefov_vgg16(**TINY)
    report = convert.load(str(path), model)
    assert report.layout == "deeplabv1_caffe"
    assert torch.equal(model.head.fc7.weight, source["fc7.weight"])
    assert str(report) == f"deeplabv1_caffe: {len(source)} tensors loaded"


def test_predictor_normalises_as_the_layout_wants(tmp_path):
    torch.save(deeplab_source(), tmp_path / "net.pth")
    predictor = Predictor(models.deeplabv1_largefov_vgg16(**TINY), weights=tmp_path / "net.pth")
    assert predictor.card.mean == pytest.approx((122.679 / 255, 116.669 / 255, 104.007 / 255))
    assert predictor.card.std == pytest.approx((1 / 255,) * 3)


def test_what_does_not_fit_stays_as_it_is():
    """One tap of 7 x 7 is no fc6, and a full upsampling kernel has no diagonal form."""
    fc6 = torch.randn(4, 4, 7, 7)
    assert thin(fc6, (4, 4, 1, 1)) is fc6
    name, full = "head.deconv.weight", torch.ones(2, 2, 4, 4)
    assert fit({name: full}, {name: torch.ones(2, 1, 4, 4)}, False)[name] is full


class Payload:
    def __reduce__(self):
        return print, ("code of the file ran",)


def test_code_in_a_file_does_not_run(tmp_path, capsys):
    path = tmp_path / "net.pth"
    torch.save({"state_dict": Payload()}, path)
    with pytest.raises(ValueError, match=r"must hold tensors and plain .* but holds print; where"):
        convert.read(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match=r"must hold tensors and plain containers only"):
        convert.read(path)
    assert "ran" not in capsys.readouterr().out


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"must be \.safetensors, \.pth, .* got .*net\.onnx"):
        convert.read(tmp_path / "net.onnx")
    (tmp_path / "net.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        convert.read(tmp_path / "net.safetensors")
    with pytest.raises(FileNotFoundError):
        convert.read(tmp_path / "absent.pth")
    torch.save({"weight": torch.ones(99)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for content in (b"", b"nothing of the kind", whole[:300]):
        (tmp_path / "net.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.pth must be a complete file of torch\.save"):
            convert.read(tmp_path / "net.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"must map names to tensors.* got list"):
        convert.read(tmp_path / "list.pth")


def test_our_own_checkpoints():
    a, b = (models.fcn16s_vgg16(**TINY) for _ in range(2))
    report = convert.load({"model": a.state_dict()}, b)
    assert report.layout == "fastseg"
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    state = a.state_dict()
    del state["head.fc7.bias"]
    with pytest.raises(ValueError, match=r"\(fastseg\) must fit FCN; missing from the source: hea"):
        convert.load(state, b)


def test_every_problem_is_named():
    source = deeplab_source()
    source["conv9_9.weight"] = source["fc10.bias"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"deeplabv1_caffe .* got also conv9_9\.weight, fc10"):
        convert.caffe(source)

    source = deeplab_source()
    del source["fc7.weight"], source["conv2_1.bias"]
    model = models.deeplabv1_largefov_vgg16(**TINY | {"num_classes": 5}, multi_scale=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="must fit DeepLabV1") as error:
        convert.load(source, model)
    for part in (
        "missing from the source: backbone.stages.1.conv2_1.bias, head.fc7.weight",
        "head.score.weight (3, 8, 1, 1) in the source, (5, 8, 1, 1) in the network",
        "head.score.bias (3,) in the source, (5,) in the network",
    ):
        assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    with pytest.raises(ValueError, match=r"not in the network: .*head\.fc6\.weight \(fc6"):
        convert.load(deeplab_source(), models.deeplabv2_vgg16(**TINY))
    with pytest.raises(ValueError, match="no known layout has the names a, b; the layouts are"):
        convert.load({"a": torch.ones(1), "b": torch.ones(1)}, model)
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'keras'"):
        convert.load(source, model, layout="keras")
    with pytest.raises(ValueError, match=r"conv1_1\.weight, .* \.\.\.; the layouts are torch"):
        convert.torchvision(deeplab_source())


def test_skip():
    model = models.deeplabv1_largefov_vgg16(**TINY | {"num_classes": 5})
    kept = model.head.score.weight.clone()
    report = convert.load(deeplab_source(), model, skip=["head.score.*"])
    assert report.kept == ["head.score.weight", "head.score.bias"]
    assert torch.equal(model.head.score.weight, kept)


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_image_channels(channels):
    """Equal channels give what the source gives for a gray image."""
    source, gray = deeplab_source(), torch.randn(1, 1, 24, 24)
    rgb = models.deeplabv1_largefov_vgg16(**TINY).eval()
    other = models.deeplabv1_largefov_vgg16(**TINY, in_channels=channels).eval()
    convert.load(source, rgb)
    convert.load(source, other)
    if channels in (1, 3):
        torch.testing.assert_close(
            other(gray.expand(1, channels, 24, 24))["out"], rgb(gray.expand(1, 3, 24, 24))["out"]
        )
    weights = (m.backbone.stages[0].conv1_1.weight for m in (other, rgb))
    ours, theirs = weights
    for c in range(channels):
        expected = theirs.sum(1) if channels == 1 else theirs[:, c % 3] * 3 / channels
        torch.testing.assert_close(ours[:, c], expected)


def test_torchvision_names_of_vgg16():
    source, renamed = vgg16_fc(Source(), 4), {}
    index = iter((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
    for name in [k for k in source if k.startswith("conv") and k.endswith("weight")]:
        n = next(index)
        for part in ("weight", "bias"):
            renamed[f"features.{n}.{part}"] = source[name.removesuffix("weight") + part]
    for fc, n in (("fc6", 0), ("fc7", 3), ("fc8", 6)):
        for part in ("weight", "bias"):
            renamed[f"classifier.{n}.{part}"] = source[f"{fc}.{part}"]
    assert convert.detect(renamed).name == "vgg16"
    ours, theirs = convert.torchvision(renamed), convert.caffe(source, bgr=False)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    with pytest.raises(ValueError, match="not in the network: backbone"):
        convert.load(renamed, nn.Conv2d(1, 1, 1))


def test_kernels_with_one_map_per_class():
    """A dense kernel whose classes do not mix fits a grouped layer."""
    dense, grouped = (BilinearUpsample2d(3, 2, mode) for mode in ("dense", "grouped"))
    with torch.no_grad():
        dense.deconv.weight *= 0.9
    convert.load({"up.deconv.weight": dense.deconv.weight}, nn.ModuleDict({"up": grouped}))
    x = torch.randn(1, 3, 5, 4)
    torch.testing.assert_close(dense(x), grouped(x))
