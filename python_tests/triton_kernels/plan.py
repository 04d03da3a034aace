"""A plan that launches Triton, where its tensors move: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import manpp_kernels
from manpp_kernels import EmaPlan
from manpp_kernels.backends import triton_interpreted
from manpp_kernels.plan import _TritonLaunch

DEVICE = "cpu" if triton_interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    with manpp_kernels.use_backend("triton"):
        yield


@pytest.mark.parametrize("change", ["memory", "dtype", "strides"])
@pytest.mark.parametrize("which", ["ema", "params", "bias", "weights"])
def test_a_tensor_that_moves(which: str, change: str) -> None:
    lists = {name: [torch.randn(4, 4, device=DEVICE).t() for _ in range(3)] for name in ("ema", "params", "bias")}
    ema, params, bias = lists.values()
    scale = torch.tensor([0.5, 1.5], device=DEVICE)
    plan = EmaPlan(ema, params, bias=bias, groups=[0, 1, 0])
    lists["weights"] = plan.update(0.5, scale)
    assert isinstance(plan._launch, _TritonLaunch)
    moved = lists[which][-1]
    if change == "memory":
        moved.data = torch.randn(4, 4, device=DEVICE)
    elif change == "dtype":
        moved.data = moved.data.t().view(torch.bfloat16)[:, :4].normal_()
    else:
        moved.data = moved.data.t()
    before = [e.double() for e in ema]
    weights = plan.update(0.75, scale)
    for i, (e, p, b, w) in enumerate(zip(ema, params, bias, weights, strict=True)):
        rtol = 1e-2 if torch.bfloat16 in (e.dtype, w.dtype) else 1e-5
        torch.testing.assert_close(e.double(), 0.75 * before[i] + 0.25 * p.double(), rtol=rtol, atol=rtol)
        s = (0.5, 1.5, 0.5)[i]
        torch.testing.assert_close(w.double(), s * b.double() + (2 - s) * e.double(), rtol=rtol, atol=rtol)


def test_scale_and_momentum_in_what_is_written() -> None:
    ema, params, bias = torch.ones(3, 8, device=DEVICE).unbind()
    plan = EmaPlan(ema, params, bias=bias)
    scale, momentum = torch.ones((), device=DEVICE), torch.full((), 0.5, device=DEVICE)
    plan.update(momentum, scale)
    with pytest.raises(ValueError, match=r"ema\[0\] overlaps scale in memory"):
        plan.update(momentum, ema[3])
    with pytest.raises(ValueError, match=r"ema\[0\] overlaps momentum in memory"):
        plan.update(ema[7], scale)
    assert ema.tolist() == [1.0] * 8
