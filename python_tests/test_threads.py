"""The CPU's kernels on several threads, also where there is one processor: each of them starts at the right element."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from reference import assert_effective_weights, assert_ema_step, clones
from torch import Tensor

import manpp_kernels
from manpp_kernels import detach_copy, ema_scale_update, scale_bias_mix

pytestmark = pytest.mark.skipif("cpu" not in manpp_kernels.available(), reason="needs the compiled library")


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    threads = torch.get_num_threads()
    with manpp_kernels.use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def by_one_and_by_three(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What ``run`` returns, of which no bit may depend on the number of threads."""
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(run())
    assert all(map(torch.equal, *results))
    return results[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_ema_scale_update(dtype: torch.dtype, rounding: str) -> None:
    sizes = [5, 70_001, 0, 40_000, 4097, *[300] * 20, 90_001]  # threads start in the middle of tensors
    groups = [i % 3 for i in range(len(sizes))]

    def run() -> list[Tensor]:
        ema, params, bias = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(3))
        before = clones(ema)
        scale = torch.tensor([0.25, 0.5, 1.5], requires_grad=True)
        bias = [b.requires_grad_() for b in bias]
        weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=groups, rounding=rounding)
        if rounding == "nearest":
            assert_ema_step(ema, before, params, 0.9)
        assert_effective_weights(weights, ema, bias, [float(scale[g]) for g in groups], 2.0)
        grads = torch.autograd.grad(weights, [scale, *bias], [w.detach() for w in weights])
        return [*ema, *weights, *grads]

    by_one_and_by_three(run)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [1, 37])
def test_scale_bias_mix(channels: int, memory_format: torch.memory_format) -> None:
    def run() -> list[Tensor]:
        maps = torch.randn(3, 9, 37, 33, 31).unbind()
        lb, ema, grad = (t.contiguous(memory_format=memory_format) for t in maps)
        inputs = [t.requires_grad_() for t in (lb, ema, torch.rand(channels))]
        out = scale_bias_mix(*inputs)
        s = inputs[2].detach().view(-1, 1, 1)
        torch.testing.assert_close(out, s * lb + (2 - s) * ema)
        found = torch.autograd.grad(out, inputs, grad)
        exact = (grad.double() * (lb.double() - ema.double())).sum((0, 2, 3) if channels > 1 else None)
        torch.testing.assert_close(found[2], exact.float().view(channels), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(found[:2], (s * grad, (2 - s) * grad))
        return [out, *found]

    by_one_and_by_three(run)


def test_detach_copy() -> None:
    def run() -> list[Tensor]:
        x = torch.randn(7, 130, 33, 31)
        y = detach_copy(x, dtype=torch.bfloat16, memory_format=torch.channels_last)
        assert torch.equal(y, x.bfloat16())
        return [y]

    by_one_and_by_three(run)
