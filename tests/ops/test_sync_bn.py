"""conv_bn_act over several processes against one process that has the whole batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel

from fastseg.nn import ConvBNReLU2d, convert_sync_batchnorm
from fastseg.ops import conv_bn_act
from fastseg.ops.sync_bn import merge_stats, sync_conv_bn_act

from ..cuda_emulation.build import emulated_ops

PARTS = ([3, 1], [0, 4])  # images of each process
GEOMETRY = {"stride": 2, "padding": (2, 1), "dilation": (2, 1)}


def data():
    """x, weight, bias, bn weight, bn bias, residual of the whole batch; gradient of the result."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 5, 11, 9), (7, 5, 3, 3), (7,), (7,), (7,), (4, 7, 6, 5), (4, 7, 6, 5)]
    *tensors, upstream = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.requires_grad_() for t in tensors], upstream


def step(fn, rows, with_residual, activation):
    """Result, running statistics and gradients of what images `rows` contribute."""
    (x, weight, bias, g, b, residual), upstream = data()
    running = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    r = residual[rows] if with_residual else None
    options = {"activation": activation, "negative_slope": 0.2, "momentum": 0.3}
    z = fn(x[rows], weight, bias, g, b, *running, r, **GEOMETRY, **options)
    wanted = [x, weight, bias, g, b] + [residual] * with_residual
    return [z.detach(), *running, *torch.autograd.grad(z, wanted, upstream[rows])]


def whole_batch(*arguments, **options):
    return conv_bn_act(*arguments, training=True, **options)


def network():
    torch.manual_seed(0)
    layers = ConvBNReLU2d(5, 6, 3, padding=1), ConvBNReLU2d(6, 4, 1, activation="none")
    return nn.Sequential(*layers).double()


def process(rank, rendezvous, emulate):
    with emulated_ops() if emulate else contextlib.nullcontext():
        part_of_two(rank, rendezvous)


def part_of_two(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    for images in PARTS:
        begin = sum(images[:rank])
        rows = slice(begin, begin + images[rank])
        for residual, activation in ((True, "relu"), (False, "leaky_relu"), (True, "none")):
            own = step(sync_conv_bn_act, rows, residual, activation)
            full = step(whole_batch, slice(None), residual, activation)
            torch.testing.assert_close(own[0], full[0][rows])
            for i in (1, 2):  # running statistics
                torch.testing.assert_close(own[i], full[i])
            for mine, expected in zip(own[3:], full[3:], strict=True):
                dist.all_reduce(mine)  # gradients are those of the own part
                torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-7)

    # The layer, converted, under DistributedDataParallel.
    model = DistributedDataParallel(convert_sync_batchnorm(network()))
    (x, *_), _ = data()
    model(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    reference = network()
    reference(x).square().sum().backward()
    for mine, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(2 * mine.grad, expected.grad, atol=1e-9, rtol=1e-7)
    for mine, expected in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, expected)
    dist.barrier()  # who leaves first takes its connections along
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")
def test_two_processes_equal_one(tmp_path, request):
    emulate = request.config.getoption("--emulate")
    mp.spawn(process, (str(tmp_path / "rendezvous"), emulate), nprocs=2)


def test_merged_statistics_keep_their_digits():
    parts = [1e4 + torch.randn(n, 3) for n in (5, 1, 900)]
    stats = [
        torch.cat([torch.tensor([float(len(p))]), p.mean(0), p.var(0, correction=0)]) for p in parts
    ]
    mean, var, count = merge_stats(torch.stack([*stats, torch.zeros(7)]))  # and an empty part
    together = torch.cat(parts).double()
    torch.testing.assert_close(mean.double(), together.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), together.var(0, correction=0), rtol=1e-3, atol=0)
    assert count.item() == 906


def test_conversion():
    model = nn.Sequential(ConvBNReLU2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    keys = list(model.state_dict())
    assert convert_sync_batchnorm(model) is model
    assert model[0].synchronized
    assert isinstance(model[1][0], nn.SyncBatchNorm)
    assert list(model.state_dict()) == keys
    alone = ConvBNReLU2d(3, 4, 1)
    x = torch.randn(2, 3, 4, 4)
    expected = alone(x)  # one process: as before
    torch.testing.assert_close(convert_sync_batchnorm(alone)(x), expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_operator_registration(channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.randn(2, 6, 5, 4, device=device).contiguous(memory_format=layout)
    mean, scale, shift = torch.randn(3, 6, device=device)
    norm = mean, torch.rand(6, device=device) + 0.5, scale, shift
    weight = torch.randn(3, 6, 1, 1, device=device)
    sums, count = torch.randn(2, 6, device=device), torch.full((1,), 40.0, device=device)
    ops = torch.ops.fastseg
    opcheck(ops.conv_stats.default, (y, weight, None, [1, 1], [0, 0], [1, 1], 1))
    for residual in (None, torch.randn_like(y)):
        opcheck(ops.bn_act.default, (y, *norm, residual, 1e-5, 0.1))
        opcheck(ops.bn_act_backward_sums.default, (y + 1, y, *norm, residual, 1e-5, 0.1))
    opcheck(ops.bn_act_backward_apply.default, (y + 1, False, y, *norm, sums, count, 1e-5, 0.0))
