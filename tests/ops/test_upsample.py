"""upsample_argmax and upsample_softmax against F.interpolate followed by argmax or softmax."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from fastseg import _C
from fastseg.ops import (
    upsample_argmax,
    upsample_argmax_reference,
    upsample_softmax,
    upsample_softmax_reference,
)
from tests.conftest import assert_as_accurate

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [  # (N, C, h, w), (H, W)
    ((2, 21, 17, 17), (129, 129)),
    ((1, 37, 9, 47), (72, 376)),
    ((2, 5, 33, 17), (40, 41)),  # small results have a kernel of their own in torch
    ((1, 7, 100, 90), (70, 65)),  # down
    ((1, 5, 200, 300), (100, 61)),  # far down
    ((1, 300, 9, 11), (80, 90)),  # int16 labels
    ((3, 6, 30, 40), (30, 130)),  # rows stay
    ((1, 4, 97, 99), (97, 99)),  # nothing changes
    ((2, 4, 1, 1), (200, 7)),
    ((1, 2, 50, 1), (1, 300)),
    ((1, 1, 3, 4), (150, 6)),
]


def full_logits(logits, size, align_corners=False):
    """On two threads at least: on one, torch rounds maps of three channels otherwise, as it does on
    CUDA if it is to be deterministic (--poison)."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(max(before[0], 2))
    torch.use_deterministic_algorithms(False)
    try:
        return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=True)


def assert_same_labels(labels, logits, size, align_corners=False, ties=False):
    """The very labels of torch where its roundings are reproduced; elsewhere their logit is the
    largest one up to rounding. `ties`: where many are equal, rounding decides often."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    full = full_logits(wide, size, align_corners)
    expected = full.argmax(1)
    on_cpu = logits.device.type == "cpu" and "--emulate" not in sys.argv
    if on_cpu and _C.cpu_isa() == _C.supported_cpu_isas()[-1] != "baseline":
        assert torch.equal(labels.long(), expected)
        return
    got = full.gather(1, labels.long()[:, None])[:, 0]
    top = full.amax(1)
    tolerance = 4 * torch.finfo(full.dtype).eps * logits.abs().max()
    assert ((top - got) <= tolerance).all()
    assert ties or (labels.long() != expected).double().mean() < 1e-4


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)
def test_forward(shape, size, dtype, channels_last, align_corners, device):
    logits = torch.randn(shape, dtype=dtype, device=device) * 3
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels, prob = upsample_argmax(logits, size, align_corners, return_prob=True)
    assert labels.dtype == (torch.uint8 if shape[1] <= 256 else torch.int16)
    assert_same_labels(labels, logits, size, align_corners)
    assert torch.equal(labels, upsample_argmax(logits, size, align_corners))

    wide = logits if dtype == torch.float64 else logits.float()
    plain = upsample_softmax_reference(wide, size, align_corners)
    # The float64 answer for the same interpolated logits: positions are rounded in both.
    exact = full_logits(wide, size, align_corners).double().softmax(1)
    assert prob.dtype == wide.dtype
    check(prob, plain.amax(1), exact.amax(1))
    probs = upsample_softmax(logits, size, align_corners)
    assert probs.is_contiguous()
    assert probs.dtype == dtype
    check(probs, plain.to(dtype), exact)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 19, 128, 256), (1024, 2048)), ((1, 21, 65, 65), (513, 513))], ids=str
)
def test_labels_of_whole_images(shape, size, channels_last, device):
    logits = torch.randn(shape, device=device)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    assert_same_labels(upsample_argmax(logits, size), logits, size)


def check(fast, plain, exact):
    if fast.dtype == torch.float64:  # the reference has the same precision: nothing is exact
        torch.testing.assert_close(fast, exact, rtol=1e-12, atol=1e-14)
    else:
        assert_as_accurate(fast, plain, exact)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_instruction_set(channels_last, cpu_isa):
    for shape, size in SHAPES[:6]:
        for dtype in DTYPES:
            logits = torch.randn(shape, dtype=dtype) * 3
            if channels_last:
                logits = logits.contiguous(memory_format=torch.channels_last)
            labels, prob = upsample_argmax(logits, size, return_prob=True)
            assert_same_labels(labels, logits, size)
            wide = logits if dtype == torch.float64 else logits.float()
            # Positions round differently without FMA: 1e-7 of the width, times the logits' slope.
            expected = upsample_softmax_reference(wide, size)
            torch.testing.assert_close(prob, expected.amax(1).to(prob.dtype), rtol=1e-4, atol=1e-4)
            loose = {torch.float32: 1e-4, torch.float64: 1e-12}.get(dtype, 2e-2)
            probs = upsample_softmax(logits, size)
            torch.testing.assert_close(probs, expected.to(dtype), rtol=loose, atol=loose / 4)


sizes = st.integers(1, 40)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 20), sizes, sizes),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    align_corners=st.booleans(),
    channels_last=st.booleans(),
    few_values=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_size(shape, size, align_corners, channels_last, few_values, seed):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if few_values:  # ties everywhere: the first class wins
        logits = logits.round()
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels, prob = upsample_argmax(logits, size, align_corners, return_prob=True)
    assert labels.shape == prob.shape == (shape[0], *size)
    if shape[0] > 0:
        assert_same_labels(labels, logits, size, align_corners, few_values)
    probs = upsample_softmax(logits, size, align_corners)
    torch.testing.assert_close(
        probs, full_logits(logits, size, align_corners).softmax(1) if shape[0] else probs
    )
    torch.testing.assert_close(prob, probs.amax(1))


@settings(max_examples=40, deadline=None)
@given(
    corner=st.floats(-100, 100, width=32),
    slopes=st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)),
    size=st.tuples(st.integers(2, 90), st.integers(2, 90)),
)
def test_planes_stay_planes(corner, slopes, size):
    # Bilinear resizing with aligned corners maps a linear function to itself; two classes that
    # differ by it have the probability of its sigmoid.
    rows, cols = torch.linspace(0, 1, 5)[:, None], torch.linspace(0, 1, 4)
    plane = corner + slopes[0] * rows + slopes[1] * cols
    logits = torch.stack([plane, torch.zeros_like(plane)])[None]
    y, x = torch.linspace(0, 1, size[0])[:, None], torch.linspace(0, 1, size[1])
    expected = torch.sigmoid(corner + slopes[0] * y + slopes[1] * x)
    got = upsample_softmax(logits, size, align_corners=True)[0, 0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_infinity_and_ties(dtype, channels_last, cpu_isa):
    logits = torch.randn(1, 9, 12, 13, dtype=dtype)
    logits[0, 3, 4, 5] = logits[0, 1, 4, 6] = logits[0, 8, 4, 6] = torch.nan
    logits[0, 2, 8, 8] = torch.inf
    logits[0, 5, 2, 2] = -torch.inf
    logits[0, :, 10, 10] = -torch.inf
    logits[0, :, 0] = 1.0
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    # Sizes at which positions are exact: else a weight that rounds to 0 in one and to 1e-7 in the
    # other makes an infinity of a number.
    for size in ((24, 26), (6, 13), (12, 13), (96, 208)):
        labels, prob = upsample_argmax(logits, size, return_prob=True)
        full = full_logits(logits, size)
        assert torch.equal(labels.long(), full.argmax(1))
        expected = full.softmax(1)
        assert torch.equal(prob.isnan(), expected.isnan().any(1))
        probs = upsample_softmax(logits, size)
        torch.testing.assert_close(probs, expected, equal_nan=True)


def test_probabilities_of_distant_logits(not_emulated):  # whose resizing rounds once more: 4e-6
    logits = torch.tensor([0.0, -50.0, -86.0, -90.0, -200.0, -3e38])[None, :, None, None]
    got = upsample_softmax(logits, (3, 130))
    expected = full_logits(logits, (3, 130)).double().softmax(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-37)


def test_empty_batch_and_strides(device):
    empty = torch.zeros(0, 4, 3, 3, device=device)
    assert upsample_argmax(empty, (6, 7)).shape == (0, 6, 7)
    assert upsample_softmax(empty, (6, 7)).shape == (0, 4, 6, 7)
    logits = torch.randn(2, 8, 20, 30, device=device)
    for view in (
        logits[:, ::2],
        logits[..., 3:],
        logits.transpose(2, 3),
        logits.expand(2, 8, 20, 30),
    ):
        labels = upsample_argmax(view, (160, 170))
        assert torch.equal(labels, upsample_argmax(view.contiguous(), (160, 170)))
        probs = upsample_softmax(view, (160, 170))
        assert torch.equal(probs, upsample_softmax(view.contiguous(), (160, 170)))


def test_same_bits_for_any_number_of_threads(threads):
    logits = torch.randn(1, 19, 40, 50)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(upsample_softmax(logits, (333, 444)))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_memory_grows_with_the_labels_only():
    from torch.profiler import ProfilerActivity, profile

    logits, size = torch.randn(1, 64, 32, 32), (512, 512)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        upsample_argmax(logits, size, return_prob=True)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in measured.key_averages())
    assert 0 < allocated <= 5 * size[0] * size[1] + 1024  # a byte and a float per pixel


@pytest.mark.parametrize("align_corners", [False, True])
def test_gradient(align_corners, device):
    for shape, size in (((2, 3, 4, 5), (7, 9)), ((1, 4, 6, 5), (3, 4))):
        logits = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        assert gradcheck(
            lambda t, size=size: upsample_softmax(t, size, align_corners),
            (logits,),
            fast_mode=True,
            nondet_tol=1e-12 if device == "cuda" else 0.0,  # torch's adjoint of a resize adds there
        )
        assert not upsample_argmax(logits, size).requires_grad


def test_operator_registration(device):
    for channels in (3, 300):
        logits = torch.randn(2, channels, 4, 5, device=device)
        for prob in (False, True):
            opcheck(torch.ops.fastseg.upsample_argmax.default, (logits, 9, 8, False, prob))
    logits = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    opcheck(torch.ops.fastseg.upsample_softmax.default, (logits, 9, 8, True))


def test_compile(device):
    def call(logits, scale):
        size = (logits.shape[2] * scale, logits.shape[3] * scale)
        return upsample_argmax(logits, size, return_prob=True), upsample_softmax(logits, size)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for h in (5, 8, 11):
        logits = torch.randn(1, 3, h, 7, device=device)
        (labels, prob), probs = compiled(logits, 4)
        (labels_eager, prob_eager), probs_eager = call(logits, 4)
        assert torch.equal(labels, labels_eager)
        assert torch.equal(prob, prob_eager)
        assert torch.equal(probs, probs_eager)


def test_reference_labels():
    logits = torch.randn(1, 4, 5, 6)
    labels, prob = upsample_argmax_reference(logits, (10, 12), return_prob=True)
    full = full_logits(logits, (10, 12)).softmax(1)
    assert torch.equal(labels.long(), full.argmax(1))
    assert torch.equal(prob, full.amax(1))


@pytest.mark.parametrize("op", [upsample_argmax, upsample_softmax])
def test_errors(op):
    logits = torch.randn(1, 3, 4, 5)
    for message, arguments in {
        "logits must be floating point": (logits.long(), (8, 8)),
        r"\(N, C, h, w\), got torch.float32 \(3, 4, 5\)": (logits[0], (8, 8)),
        "C, h and w must be at least 1": (logits[:, :0], (8, 8)),
        r"size must be \(H, W\), both at least 1, got \(0, 4\)": (logits, (0, 4)),
        r"got \(4,\)": (logits, (4,)),
    }.items():
        with pytest.raises(ValueError, match=message):
            op(*arguments)
    if op is upsample_argmax:
        with pytest.raises(ValueError, match="at most 32768 classes"):
            op(torch.zeros(1, 32769, 1, 1), (2, 2))
