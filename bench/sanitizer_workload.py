"""Every operator once on awkward inputs, small: what compute-sanitizer runs (``--error-exitcode`` tells the rest).

    compute-sanitizer --tool memcheck python bench/sanitizer_workload.py [backend [update plan stochastic mix copy]]

Results are compared with the eager backend, so that a run that computed nothing does not pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import manpp_kernels
from manpp_kernels import EmaPlan, detach_copy, ema_scale_update, scale_bias_mix

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "cuda"
ONLY = sys.argv[2:]  # for a look at some of them
DEVICE = "cpu" if BACKEND == "cpu" else "cuda"
SHAPES = [(0,), (1,), (3, 5), (127,), (1031,), (4096,), (64, 64, 3, 3), (10007,)] + [(17,)] * 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def update(ema_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    ema, params, bias = draw(SHAPES, ema_dtype), draw(SHAPES, dtype), draw(SHAPES, dtype)
    scale = torch.tensor([0.5, 1.25], device=DEVICE, requires_grad=True)
    groups = [i % 2 for i in range(len(SHAPES))]
    bias = [b.requires_grad_() for b in bias]
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=groups)
    grads = torch.autograd.grad(weights, [scale, *bias], [torch.ones_like(w) for w in weights])
    return [*ema, *weights, *grads]


def plan(ema_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    ema, params, bias = draw(SHAPES, ema_dtype), draw(SHAPES, dtype), draw(SHAPES, dtype)
    momentum = torch.tensor(0.9, device=DEVICE)
    EmaPlan(ema, params).update(momentum)
    weights = EmaPlan(ema, params, bias=bias).update(0.9, scale=torch.tensor(0.5, device=DEVICE))
    return [*ema, *(weights or [])]


def stochastic(ema_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    ema, params = draw(SHAPES, ema_dtype), draw(SHAPES, dtype)
    ema_scale_update(ema, params, 0.9, rounding="stochastic")
    return ema


def mix(layout: torch.memory_format, channels: int) -> list[Tensor]:
    found = []
    for dtype in DTYPES[:2]:
        for scale in (torch.tensor(0.5), torch.rand(channels)):
            # Enough of them that the sums are those of several blocks.
            maps = [torch.randn(40, channels, 7, 9, device=DEVICE).to(dtype, memory_format=layout) for _ in range(3)]
            inputs = [t.detach().requires_grad_() for t in (*maps[:2], scale.to(DEVICE))]
            y = scale_bias_mix(*inputs)
            found += [y, *torch.autograd.grad(y, inputs, maps[2])]
    return found


def copy(layout: torch.memory_format, channels: int) -> list[Tensor]:
    x = torch.randn(3, channels, 33, 31, device=DEVICE)
    return [detach_copy(x, dtype=dtype, memory_format=layout) for dtype in DTYPES] + [detach_copy(x[:, :, ::2])]


def works() -> list[tuple[Callable[..., list[Tensor]], tuple[object, ...]]]:
    pairs = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
    found: list[tuple[Callable[..., list[Tensor]], tuple[object, ...]]] = []
    found += [(f, pair) for f in (update, plan, stochastic) for pair in pairs]
    layouts = (torch.contiguous_format, torch.channels_last)
    found += [(f, (layout, channels)) for f in (mix, copy) for layout in layouts for channels in (5, 16)]
    return [(f, arguments) for f, arguments in found if not ONLY or f.__name__ in ONLY]


def run(backend: str, function: Callable[..., list[Tensor]], arguments: tuple[object, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    with manpp_kernels.use_backend(backend):
        return [t.detach().double().cpu() for t in function(*arguments)]


def main() -> int:
    for function, arguments in works():
        for ours, reference in zip(run(BACKEND, function, arguments), run("eager", function, arguments), strict=True):
            torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{BACKEND}: {len(works())} pieces of work agree with eager")
    return 0


if __name__ == "__main__":
    sys.exit(main())
