"""scale_bias_mix in Triton against the eager backend: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest
import torch
from torch import Tensor

import manpp_kernels
from manpp_kernels.backends import eager, triton_interpreted
from manpp_kernels.backends.triton import scale_bias_mix, scale_bias_mix_backward, tables

DEVICE = "cpu" if triton_interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Flat, planes of a power of two and odd ones, planes wider than a tile, many channels, single ones, none at all.
SHAPES = [
    (5, 6),
    (300, 7),
    (2, 2500),
    (3, 16, 8, 8),
    (3, 9, 7, 7),
    (1, 2, 33, 65),
    (2, 4, 6),
    (1, 1, 1, 1),
    (0, 3, 2, 2),
]


def maps(shape: tuple[int, ...], dtype: torch.dtype, last: bool, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    xs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE) for _ in range(count)]
    return [x.contiguous(memory_format=torch.channels_last) for x in xs] if last else xs


def scales(channels: int) -> list[Tensor]:
    wide = torch.linspace(-1, 2, 2 * channels, device=DEVICE)
    return [torch.tensor(0.7, device=DEVICE), wide[:channels].bfloat16(), wide[::2]]


CASES = [
    (shape, last, dtype)
    for shape in SHAPES
    for last in ((False, True) if len(shape) == 4 else (False,))
    for dtype in (DTYPES if shape == (3, 16, 8, 8) else DTYPES[:2])
]


@pytest.mark.parametrize(("shape", "last", "dtype"), CASES)
def test_both_passes(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    lb, ema, grad = maps(shape, dtype, last, 3)
    for scale in scales(shape[1]):
        out = scale_bias_mix(lb, ema, scale, 2.0)
        assert torch.equal(out, eager.scale_bias_mix(lb, ema, scale, 2.0))
        assert out.stride() == lb.stride()
        mine = scale_bias_mix_backward(grad, lb, ema, scale, 2.0, True, True)
        theirs = eager.scale_bias_mix_backward(grad, lb, ema, scale, 2.0, True, True)
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        wide = eager.scale_bias_mix_backward(
            grad.double(), lb.double(), ema.double(), scale.double(), 2.0, False, False
        )[2]
        rtol = {torch.bfloat16: 1e-2}.get(scale.dtype, 1e-5)
        torch.testing.assert_close(mine[2].double(), wide, rtol=rtol, atol=2e-4)
        assert mine[2].dtype == scale.dtype


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_only_what_is_asked_for(per_channel: bool, last: bool) -> None:
    lb, ema, grad = maps((2, 16, 3, 3), torch.float32, last, 3)
    scale = scales(16)[2 if per_channel else 0]
    for need_lb, need_ema, need_scale in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)):
        maps_ = (lb, ema) if need_scale else (None, None)
        mine = scale_bias_mix_backward(grad, *maps_, scale, 1.5, bool(need_lb), bool(need_ema))
        theirs = eager.scale_bias_mix_backward(grad, *maps_, scale, 1.5, bool(need_lb), bool(need_ema))
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_layouts_that_differ() -> None:
    """Operands of other strides are copied; the result has those of the first."""
    shape = (2, 16, 3, 5)
    plain, last = maps(shape, torch.float32, False, 3), maps(shape, torch.float32, True, 3)
    holes = torch.stack([plain[0]] * 2, -1)[..., 0]
    expanded = torch.randn(1, 16, 1, 1, device=DEVICE).expand(shape)
    for scale in scales(16):
        for lb, ema, grad in (
            (plain[0], last[1], last[2]),
            (last[0], plain[1], plain[2]),
            (holes, last[1], expanded),
            (expanded, holes, holes),
        ):
            out = scale_bias_mix(lb, ema, scale, 2.0)
            assert torch.equal(out, eager.scale_bias_mix(lb, ema, scale, 2.0))
            assert out.stride() == torch.empty_like(lb).stride()
            mine = scale_bias_mix_backward(grad, lb, ema, scale, 2.0, True, True)
            theirs = eager.scale_bias_mix_backward(grad, lb, ema, scale, 2.0, True, True)
            for x, y in zip(mine, theirs, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)
            assert mine[0].stride() == torch.empty_like(grad).stride()


def test_reduction_is_the_same_every_time_and_leaves_no_trace() -> None:
    """Several programs a channel; counters stand at zero afterwards, or the second call would go wrong."""
    lb, ema, grad = maps((2, 3, 50, 50), torch.float32, False, 3)
    for scale in scales(3):
        first, second = (scale_bias_mix_backward(grad, lb, ema, scale, 2.0, False, False)[2] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("last", [False, True])
def test_more_tiles_than_programs_and_more_shares_than_slots(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[scale_bias_mix_backward.__module__]  # the function stands in the package under its name
    monkeypatch.setattr(module, "SLOTS", 2)
    monkeypatch.setattr(module, "REDUCING_PROGRAMS", 36 if last else 6)
    lb, ema, grad = maps((2, 64, 25, 25) if last else (2, 3, 50, 50), torch.float32, last, 3)
    for scale in scales(lb.shape[1]):
        found = scale_bias_mix_backward(grad, lb, ema, scale.double(), 2.0, True, False)
        exact = grad.double() * (lb.double() - ema.double())
        torch.testing.assert_close(found[2], exact.sum((0, 2, 3) if scale.dim() else None), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found[0], (scale.view(-1, 1, 1) if scale.dim() else scale) * grad)


def test_captures_take_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    monkeypatch.setattr(tables, "RESERVE", 10)
    monkeypatch.setattr(tables, "_reserves", {})
    monkeypatch.setattr(tables, "_counters", {})
    capturing = True
    monkeypatch.setattr(tables, "is_capturing", lambda device: capturing)
    found = [tables.zero_counters(4, device)]  # without a reserve, which is not made inside a capture
    assert not tables._reserves
    capturing = False
    found.append(tables.zero_counters(4, device))
    assert tables.zero_counters(4, device) is found[1]  # a stream's own
    capturing = True
    found += [tables.zero_counters(4, device) for _ in range(3)]  # the last finds too few left
    assert all(x.tolist()[:4] == [0] * 4 for x in found)
    ranges = sorted((x.data_ptr(), x.data_ptr() + 16) for x in found)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert len(tables._reserves[device]) == 2


def test_counters_are_none_of_this_threads_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is warmed up takes these for its own."""
    monkeypatch.setattr(tables, "_reserves", {})
    monkeypatch.setattr(tables, "_counters", {})
    threads, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: threads.append(threading.get_ident()) or zeros(*a, **k))
    tables.zero_counters(4, torch.device(DEVICE))
    assert len(threads) == 2
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradcheck(per_channel: bool, last: bool) -> None:
    lb, ema = (x.requires_grad_() for x in maps((1, 2, 2, 2), torch.float64, last, 2))
    scale = (
        torch.linspace(0.5, 1, 2, dtype=torch.float64, device=DEVICE)
        if per_channel
        else torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
    )
    with manpp_kernels.use_backend("triton"):
        assert torch.autograd.gradcheck(manpp_kernels.scale_bias_mix, (lb, ema, scale.requires_grad_()))
