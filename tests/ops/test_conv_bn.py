"""conv_bn_act against plain PyTorch in float64, forward, backward and statistics."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck

from fastseg.ops import conv_act, conv_bn_act, conv_bn_act_reference, fold_bn
from tests.conftest import assert_as_accurate

pytestmark = pytest.mark.usefixtures("smallest_fused")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GEOMETRY = ("stride", "padding", "dilation", "groups")
# (N, C_in, H, W), C, options
CASES = {
    "dilated": ((2, 6, 17, 13), 22, {"kernel": 3, "padding": 2, "dilation": 2}),
    "grouped": ((1, 8, 9, 11), 12, {"kernel": 3, "stride": 2, "padding": (1, 0), "groups": 4}),
    "pointwise": ((3, 5, 7, 9), 300, {"kernel": 1}),
    "same": ((2, 3, 8, 9), 7, {"kernel": (2, 5), "padding": "same", "dilation": (1, 2)}),
    "pooled": ((4, 16, 1, 1), 33, {"kernel": 1}),
    "one channel": ((2, 3, 31, 33), 1, {"kernel": 3, "padding": "valid"}),
}


def inputs(case, dtype=torch.float32, device="cpu", channels_last=False, residual=False):
    """Positional arguments of conv_bn_act and its options."""
    shape, C, options = CASES[case]
    options = dict(options)
    kh, kw = (options["kernel"],) * 2 if isinstance(options["kernel"], int) else options["kernel"]
    del options["kernel"]
    x = torch.randn(shape)
    weight = torch.randn(C, shape[1] // options.get("groups", 1), kh, kw) * 0.3
    out = F.conv2d(x, weight, None, **options).shape
    r = torch.randn(out) if residual else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = [t if t is None else t.to(device, dtype) for t in (x, weight, torch.randn(C))]
    arguments += [
        t.to(device, stats)
        for t in (torch.randn(C), torch.randn(C), torch.randn(C), torch.rand(C) + 0.5)
    ]
    return [*arguments, None if r is None else r.to(device, dtype)], options


def check(fast, plain, exact, factor=2.0):
    if fast.dtype == torch.float64:  # the reference has the same precision: nothing is exact
        torch.testing.assert_close(fast, exact, rtol=1e-10, atol=1e-11)
    else:
        assert_as_accurate(fast, plain, exact, factor)


def copies(arguments, dtype=None):
    return [None if t is None else t.to(dtype or t.dtype, copy=True) for t in arguments]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, channels_last, training, device):
    for residual in (False, True):
        for activation in ("relu", "leaky_relu", "none"):
            arguments, options = inputs(case, dtype, device, channels_last, residual)
            options |= {"training": training, "activation": activation}
            plain_in, exact_in = copies(arguments), copies(arguments, torch.float64)
            fast = conv_bn_act(*arguments, **options)
            plain = conv_bn_act_reference(*plain_in, **options)
            exact = conv_bn_act_reference(*exact_in, **options)
            check(fast, plain, exact)
            y = F.conv2d(*arguments[:3], **{k: options[k] for k in options if k in GEOMETRY})
            assert fast.stride() == y.stride()
            for i in (5, 6):  # running mean and variance
                check(arguments[i], plain_in[i], exact_in[i])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_instruction_set(channels_last, cpu_isa):
    for dtype in DTYPES:
        arguments, options = inputs("dilated", dtype, "cpu", channels_last, residual=True)
        # A pre-activation that rounds to the other side of 0 flips its gradient: no kink in 16 bit.
        wide = dtype in (torch.float32, torch.float64)
        options |= {"training": True, "activation": "leaky_relu" if wide else "none"}
        upstream, results = torch.randn(2, 22, 17, 13, dtype=torch.float64), []
        for op, leaves in (
            (conv_bn_act, copies(arguments)),
            (conv_bn_act_reference, copies(arguments)),
            (conv_bn_act_reference, copies(arguments, torch.float64)),
        ):
            wanted = [leaves[i].requires_grad_() for i in (0, 1, 3, 4, 7)]
            z = op(*leaves, **options)
            results.append((z, *torch.autograd.grad(z, wanted, upstream.to(z.dtype))))
        for fast, plain, exact in zip(*results, strict=True):
            check(fast, plain, exact)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_gradient(channels_last, activation, training, device):
    for case, residual in (("dilated", True), ("grouped", False), ("pooled", True)):
        arguments, options = inputs(case, torch.float64, device, channels_last, residual)
        options |= {"training": training, "activation": activation}
        x, weight, bias, bn_weight, bn_bias, mean, var, r = arguments
        x, weight, bn_weight, bn_bias = x[:, :, :5, :4], weight[:4], bn_weight[:4], bn_bias[:4]
        r = None
        if residual:
            shape = F.conv2d(x, weight, None, **{k: options[k] for k in options if k in GEOMETRY})
            r = torch.randn_like(shape).requires_grad_()

        def call(x, weight, bias, bn_weight, bn_bias, r, options=options, mean=mean, var=var):
            return conv_bn_act(
                x, weight, bias, bn_weight, bn_bias, mean[:4].clone(), var[:4].clone(), r, **options
            )

        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias[:4])]
        leaves += [t.detach().clone().requires_grad_() for t in (bn_weight, bn_bias)]
        assert gradcheck(call, (*leaves, r), fast_mode=True)


def test_gradient_matches_torch_when_few_inputs_need_it(device):
    arguments, options = inputs("dilated", torch.float64, device)
    options["training"] = True
    for wanted in (0, 1, 3):
        leaves = copies(arguments)
        leaves[wanted].requires_grad_()
        fast = conv_bn_act(*leaves, **options)
        plain = conv_bn_act_reference(*leaves, **options)
        weights = torch.randn_like(fast)
        got, expected = (torch.autograd.grad(z, leaves[wanted], weights)[0] for z in (fast, plain))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_statistics_keep_their_digits_far_from_zero(channels_last, device):
    # mean 1e4, standard deviation 1: sums of squares in float32 would have no digit left.
    # The first value, from which differences are taken, may be the one that is far off.
    x = (1e4 + torch.randn(2, 3, 65, 129)).to(device)
    x[:, 1] += 12345.0
    x[0, 2, 0, 0] = 0.0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.eye(3, device=device)[:, :, None, None]
    stats = torch.zeros(3, device=device), torch.zeros(3, device=device)
    conv_bn_act(x, weight, None, None, None, *stats, training=True, momentum=1.0)
    exact = x.double().var((0, 2, 3))
    torch.testing.assert_close(stats[1].double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(stats[0].double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_same_bits_for_any_number_of_threads(channels_last, threads):
    arguments, options = inputs("dilated", channels_last=channels_last, residual=True)
    results = []
    for count in (1, 2, 3):
        threads(count)
        fresh = [t.requires_grad_() if i == 3 else t for i, t in enumerate(copies(arguments))]
        z = conv_bn_act(*fresh, **options, training=True)
        z.sum().backward()
        results.append((z.detach(), fresh[3].grad, fresh[6]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_infinities_and_nan(device):
    x = torch.tensor([[-torch.inf, torch.inf, torch.nan, -1.0, 0.0]], device=device)[None, None]
    weight = torch.ones(1, 1, 1, 1, device=device)
    zero = torch.zeros(1, device=device)
    plain = F.conv2d(x, weight)
    for activation, expected in (
        ("relu", plain.relu()),
        ("leaky_relu", F.leaky_relu(plain, 0.01)),
        ("none", plain),
    ):
        got = conv_act(x, weight, zero, activation=activation)
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_empty_batch(training, device):
    arguments, options = inputs("dilated", device=device)
    arguments[0] = arguments[0][:0].requires_grad_()
    running = arguments[5].clone()
    z = conv_bn_act(*arguments, **options, training=training)
    assert z.shape == (0, 22, 17, 13)
    z.sum().backward()
    assert arguments[0].grad.shape == arguments[0].shape
    assert torch.equal(arguments[5], running)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_strides(training, device):
    arguments, options = inputs("dilated", device=device, residual=True)
    expected = conv_bn_act_reference(*copies(arguments), **options, training=training)
    strided = copies(arguments)
    strided[0] = arguments[0].transpose(2, 3).contiguous().transpose(2, 3)
    strided[1] = arguments[1].flip(3).flip(3).to(memory_format=torch.channels_last)
    strided[3] = torch.stack([arguments[3], arguments[3]], 1)[:, 0]
    strided[7] = arguments[7].contiguous(memory_format=torch.channels_last)
    got = conv_bn_act(*strided, **options, training=training)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, training, device):
    arguments, options = inputs("dilated", device=device, residual=True)
    options["training"] = training
    low = [t.to(dtype) if i in (0, 1, 2, 7) else t.clone() for i, t in enumerate(arguments)]
    with torch.autocast(device, dtype):
        got = conv_bn_act(*copies(arguments), **options)
    assert got.dtype == dtype
    expected = conv_bn_act_reference(*low, **options)
    exact = conv_bn_act_reference(*copies(low, torch.float64), **options)
    check(got, expected, exact)
    with torch.autocast(device, dtype):  # float64 stays, as in torch
        assert conv_bn_act(*copies(arguments, torch.float64), **options).dtype == torch.float64


def test_fold_is_differentiable_and_exact(device):
    arguments, _ = inputs("dilated", torch.float64, device)
    x, *parameters, _ = arguments
    weight, bias = fold_bn(*parameters, eps=1e-5)
    expected = F.batch_norm(
        F.conv2d(x, *parameters[:2]), *parameters[4:], *parameters[2:4], False, 0.1, 1e-5
    )
    torch.testing.assert_close(F.conv2d(x, weight, bias), expected)


def test_operator_registration(device):
    for channels_last in (False, True):
        arguments, _ = inputs("dilated", torch.float32, device, channels_last, residual=True)
        x, weight, bias, bn_weight, bn_bias, _, _, r = arguments
        geometry = ([1, 1], [2, 2], [2, 2], 1)
        for t in (x, weight, bias, bn_weight, bn_bias, r):
            t.requires_grad_()
        for slope in (0.0, 0.1, 1.0):
            opcheck(torch.ops.fastseg.conv_act.default, (x, weight, bias, r, *geometry, slope))
            for residual in (r, None):
                parameters = (bn_weight, bn_bias, residual, *geometry, 1e-5, slope)
                opcheck(torch.ops.fastseg.conv_bn_act.default, (x, weight, bias, *parameters))
        with torch.no_grad():
            y = torch.randn_like(r)
            stats = torch.randn(22, device=device), torch.rand(22, device=device)
            opcheck(
                torch.ops.fastseg.bn_act_backward.default,
                (torch.randn_like(y), y, *stats, bn_weight.detach(), None, None, 1e-5, 0.0),
            )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile(training, device):
    arguments, options = inputs("same", device=device, residual=True)
    leaves = [t.requires_grad_() if i not in (5, 6) else t for i, t in enumerate(arguments)]
    call = functools.partial(conv_bn_act, **options, training=training)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for f in (call, compiled):
        fresh = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
        z = f(*fresh)
        z.square().sum().backward()
        results.append([z, *(t if t.grad is None else t.grad for t in fresh)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_errors():
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    m, v = torch.zeros(6), torch.ones(6)

    def call(x=x, w=w, b=None, g=None, m=m, v=v, r=None, **options):
        return conv_bn_act(x, w, b, g, None, m, v, r, **options)

    for message, arguments in {
        "x and weight must have 4 dimensions": {"x": x[0]},
        "channels must be": {"x": x[:, :3]},
        "groups must divide C": {"groups": 4, "w": w[:, :1]},
        r"bias must have shape \(6,\), got \(5,\)": {"b": torch.zeros(5)},
        r"bn_weight must have shape \(6,\)": {"g": torch.ones(4)},
        r"running_var must have shape \(6,\)": {"v": torch.ones(4)},
        "x must be floating point": {"x": x.long()},
        "one dtype, got torch.float64 and torch.float32": {"x": x.double()},
        "stride must be at least 1, got 0": {"stride": 0},
        "dilation must be at least 1": {"dilation": (1, 0)},
        'padding must be "same"': {"padding": "full"},
        'padding "same" needs stride 1': {"padding": "same", "stride": 2},
        "padding must not be negative": {"padding": -1},
        "activation must be one of": {"activation": "gelu"},
        "negative_slope must be at least 0": {"negative_slope": -0.1},
        "must be given unless training": {"m": None},
        "residual must be": {"r": torch.zeros(2, 6, 3, 4)},
        "kernel must fit into the padded input": {"dilation": 3, "training": True},
        "kernel must fit into the padded input, got": {"dilation": 3, "training": False},
        "more than 1 value per channel": {"x": x[:1, :, :3, :3], "training": True},
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**arguments)
