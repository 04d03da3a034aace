"""Naive oracles in float64, and the error bounds the operators are held to.

Nothing here comes from ``manpp_kernels``: the formulas are written out again, from the method.

Tolerances. An operator computes in float32 (float64 where an input is), then rounds once to the stored dtype. So an
element may differ from the exact value by (1) the rounding errors of its own few operations, each at most half a unit
``u`` of the arithmetic relative to the magnitudes of the terms, and (2) half a unit of the stored dtype. The oracles
return the exact value and the magnitude of the terms; ``assert_close`` allows ``ops * u * magnitude`` for (1), where
``ops`` counts the roundings a term goes through, and (2) by the dtype. There is no absolute tolerance beyond half of
the smallest subnormal number. No smaller bound holds for every input, since each rounding may go the full half unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
SMALLEST = {
    torch.float64: 5e-324,
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
}


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def ema_step(ema: Tensor, params: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """``momentum * ema + (1 - momentum) * params`` and the magnitude of its terms, in float64."""
    e, p = ema.detach().double(), params.detach().double()
    return momentum * e + (1 - momentum) * p, momentum * e.abs() + (1 - momentum) * p.abs()


def effective_weights(ema: Tensor, bias: Tensor, scale: float, total: float) -> tuple[Tensor, Tensor]:
    """``scale * bias + (total - scale) * ema`` and the magnitude of its terms, in float64."""
    e, b = ema.detach().double(), bias.detach().double()
    return scale * b + (total - scale) * e, abs(scale) * b.abs() + (abs(total) + abs(scale)) * e.abs()


def per_channel(scale: Tensor, x: Tensor) -> Tensor:
    """``scale`` with as many trailing dimensions as it takes to run along dimension 1 of ``x``."""
    return scale if scale.dim() == 0 else scale.reshape(-1, *[1] * (x.dim() - 2))


def mix(lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float) -> tuple[Tensor, Tensor]:
    lb, ema, s = lb_out.detach().double(), ema_out.detach().double(), per_channel(scale.detach().double(), lb_out)
    return s * lb + (total - s) * ema, s.abs() * lb.abs() + (abs(total) + s.abs()) * ema.abs()


def mix_gradients(
    grad: Tensor, lb_out: Tensor, ema_out: Tensor, scale: Tensor, total: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """The gradients of ``mix`` with respect to its three tensors, each with the magnitude of its terms."""
    g, lb, ema = grad.double(), lb_out.detach().double(), ema_out.detach().double()
    s = per_channel(scale.detach().double(), lb_out)
    product = g * (lb - ema)
    dims = [d for d in range(g.dim()) if d != 1 or scale.dim() == 0]

    def reduce(x: Tensor) -> Tensor:
        return x.sum(dims) if dims else x.clone()

    return {
        "lb_out": (s * g, (s * g).abs()),
        "ema_out": ((total - s) * g, (abs(total) + s.abs()) * g.abs()),
        "scale": (reduce(product).reshape(scale.shape), reduce(product.abs()).reshape(scale.shape)),
    }


def not_contiguous(values: Tensor) -> Tensor:
    """The same values as a column of a matrix, with others between them in memory."""
    return torch.stack([values, values + 100], dim=1)[:, 0]


def sum_ops(count: int) -> float:
    """How many roundings a term of a sum of ``count`` may go through: a sum by a tree, plus its last few by hand.

    A running sum in float32 would need ``count`` of them, so this also tells a good reduction from a naive one.
    """
    return 8 + math.log2(max(count, 1))


def assert_close(
    got: Tensor, exact: Tensor, magnitude: Tensor, *, ops: float, arithmetic: torch.dtype, what: str
) -> None:
    """``got`` is ``exact`` (float64) but for ``ops`` roundings in ``arithmetic`` and one to its own dtype."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    got64, exact, magnitude = got.detach().cpu().double(), exact.cpu(), magnitude.cpu()
    slack = ops * HALF_UNIT[arithmetic] * magnitude + ops * SMALLEST[arithmetic] / 2
    allowed = slack + HALF_UNIT[got.dtype] * (exact.abs() + slack) + SMALLEST[got.dtype] / 2
    error = (got64 - exact).abs()
    bad = ~(error <= allowed)  # true where the error is NaN, too
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are off; at {at} {got64[at].item()!r}, "
            f"expected {exact[at].item()!r} within {allowed[at].item()!r}"
        )


def assert_ema_step(
    after: Sequence[Tensor], before: Sequence[Tensor], params: Sequence[Tensor], momentum: float, what: str = "ema"
) -> None:
    # Roundings of a term: momentum (or 1 - momentum), the product, the sum. In float64 the oracle makes as many.
    for i, (a, b, p) in enumerate(zip(after, before, params, strict=True)):
        exact, magnitude = ema_step(b, p, momentum)
        arithmetic = arithmetic_dtype(b, p)
        assert_close(
            a,
            exact,
            magnitude,
            ops=6 if arithmetic == torch.float64 else 3,
            arithmetic=arithmetic,
            what=f"{what}[{i}] {b.dtype} <- {p.dtype} {tuple(b.shape)} {b.stride()}",
        )


def assert_effective_weights(
    weights: Sequence[Tensor], ema: Sequence[Tensor], bias: Sequence[Tensor], scales: Sequence[float], total: float
) -> None:
    """``ema`` is what the operator stored; the weights are made from just that."""
    for i, (w, e, b, s) in enumerate(zip(weights, ema, bias, scales, strict=True)):
        exact, magnitude = effective_weights(e, b, s, total)
        assert w.dtype == b.dtype, f"weights[{i}] is {w.dtype}, bias {b.dtype}"
        # scale, total and their difference are rounded, then the product and the sum; the oracle's own come on top.
        assert_close(
            w, exact, magnitude, ops=8, arithmetic=arithmetic_dtype(e, b), what=f"weights[{i}] {e.dtype} {b.dtype}"
        )


def count(x: Tensor, value: float) -> int:
    """How many elements equal ``value``, piece by piece: a mask of a tensor past 2^31 elements is too large."""
    return sum(int((piece == value).sum()) for piece in x.split(1 << 26))


# ---------------------------------------------------------------------------------------------- making tensors

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "columns", "misaligned")


class Sample:
    """A tensor of random values in a layout, and the memory around it, which nobody may write."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0, device: str = "cpu"
    ) -> None:
        self.base, self.view = _LAYOUT[layout](tuple(shape), dtype, device)
        values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.base.fill_(7.0)
        self.view.copy_(values)
        outside = torch.ones(self.base.shape, dtype=torch.bool, device=device)
        outside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        self._outside = outside

    def surroundings_untouched(self) -> bool:
        return bool((self.base[self._outside] == 7.0).all())


def _new(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    base = _new(shape, dtype, device)
    return base, base


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    # Dimension 1 is the densest, as in torch.channels_last and channels_last_3d; other ranks keep their order.
    if len(shape) < 3:
        return _contiguous(shape, dtype, device)
    base = _new((shape[0], *shape[2:], shape[1]), dtype, device)
    return base, base.movedim(-1, 1)


def _transposed(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    base = _new(tuple(reversed(shape)), dtype, device)
    return base, base.permute(tuple(reversed(range(len(shape)))))


def _sliced(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Every other element along the first dimension, and not the last of the last: gaps everywhere."""
    if not shape:
        base = _new((3,), dtype, device)
        return base, base[1]
    base = _new(
        (2 * shape[0] + 1, *shape[1:-1], shape[-1] + 1) if len(shape) > 1 else (2 * shape[0] + 1,), dtype, device
    )
    view = base[1::2]
    return base, view[..., :-1] if len(shape) > 1 else view


def _columns(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A gap after every element: one column of a matrix."""
    base = _new((*shape, 3), dtype, device)
    return base, base[..., 1]


def _misaligned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Dense, but one element past an aligned address."""
    base = _new((math.prod(shape) + 2,), dtype, device)
    return base, base[1:-1].view(shape)


_LAYOUT = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "columns": _columns,
    "misaligned": _misaligned,
}

# 0, 1, primes, just over vectors of 4, 8 and 16, and around the sizes a kernel may cut its work into.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 33, 63, 65, 127, 257, 509, 1021, 1025)
CHUNK_SIZES = tuple(size + d for size in (2048, 4096, 8192, 16384, 65536) for d in (-1, 0, 1))


def samples(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    layout: str = "contiguous",
    *,
    seed: int = 0,
    device: str = "cpu",
) -> list[Sample]:
    return [Sample(shape, dtype, layout, seed=seed + i, device=device) for i, shape in enumerate(shapes)]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]
