"""Prints digests of what the CPU kernels give, for test_cpu_vectors.py: by those that ATEN_CPU_CAPABILITY names.

Of whole vectors, tails, several blocks, and results that are streamed past the caches.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from manpp_kernels import detach_copy, ema_scale_update, scale_bias_mix, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
SIZES = (1, 31, 257, 4099)
LARGE = (33 << 20) // 4 + 5


def numbers(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """By integers, as PyTorch's own random numbers differ between instruction sets."""
    return ((torch.arange(n) * 2654435761 + seed * 40503) % 65521 / 32760 - 1).to(dtype)


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(
            t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def update(ema_dtype: torch.dtype, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES, **options: Any) -> list[Tensor]:
    ema, params, bias = ([numbers(n, i, d) for n in sizes] for i, d in enumerate((ema_dtype, dtype, dtype)))
    torch.manual_seed(0)
    ema_scale_update(ema, params, 0.9, **options)
    scale = torch.tensor(0.7, requires_grad=True)
    bias = [b.requires_grad_() for b in bias]
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, **options)
    assert weights is not None
    return [*ema, *weights, *torch.autograd.grad([w.sum() for w in weights], [scale, *bias])]


def mix(dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    shape = torch.Size((3, 7, 31, 33))
    a, b, g = (numbers(shape.numel(), i, dtype).view(shape).to(memory_format=memory_format) for i in range(3))
    inputs = [a.requires_grad_(), b.requires_grad_(), numbers(shape[1], 3, torch.float32).requires_grad_()]
    y = scale_bias_mix(*inputs)
    return [y, *torch.autograd.grad(y, inputs, g)]


def copies(dtype: torch.dtype, result: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    x = numbers(3 * 65 * 31 * 33, 0, dtype).view(3, 65, 31, 33)
    return [detach_copy(x.to(memory_format=f), dtype=result, memory_format=memory_format) for f in FORMATS]


def main() -> None:
    for ema_dtype, dtype in itertools.product(DTYPES, DTYPES):
        print("update", ema_dtype, dtype, digest(update(ema_dtype, dtype)))
        if ema_dtype.itemsize == 2:
            print("stochastic", ema_dtype, dtype, digest(update(ema_dtype, dtype, rounding="stochastic")))
    for dtype, memory_format in itertools.product(DTYPES, FORMATS):
        print("mix", dtype, memory_format, digest(mix(dtype, memory_format)))
        for result in DTYPES[1:]:
            print("copy", dtype, result, memory_format, digest(copies(dtype, result, memory_format)))
    print("large update", digest(update(torch.float32, torch.float32, (LARGE,))))
    print("large copy", digest([detach_copy(numbers(LARGE, 0, torch.bfloat16), dtype=torch.float32)]))


if __name__ == "__main__":
    with use_backend("cpu"):
        main()
