"""``detach_copy``: a gradient-isolated copy, cast and laid out anew in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from manpp_kernels._library import Operator
from manpp_kernels.backends import eager


def _fake(x: Tensor, out: Tensor) -> None:
    return None


_copy = Operator("detach_copy", "(Tensor x, Tensor(a!) out) -> ()", fake=_fake, eager=eager.detach_copy)


def detach_copy(
    x: Tensor,
    out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Copy ``x`` out of its graph, casting it and changing its memory format on the way, in one pass.

    What crosses the boundary between two local blocks: the next block reads it, and no gradient goes back through it.
    Where no copy is needed (same dtype and layout, and the producer does not overwrite ``x``), ``x.detach()`` is free.

    Args:
        x: any shape, any floating-point, integer or bool dtype.
        out: written in place and returned, of the shape and device of ``x``. Excludes the two arguments below.
        dtype: of the result; that of ``x`` if None.
        memory_format: of the result; the layout of ``x`` is kept if None.

    Returns:
        ``out``, or a new tensor; it does not require grad.

    Raises:
        TypeError: ``x`` or ``out`` is not a tensor, or is complex.
        ValueError: ``out`` does not fit ``x``, overlaps it, or comes together with ``dtype`` or ``memory_format``.
        RuntimeError: ``out`` requires grad.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x has to be a tensor, and is {type(x).__name__}")
    if x.is_complex() or (dtype is not None and dtype.is_complex):
        raise TypeError(f"detach_copy takes no complex tensors; found {x.dtype if x.is_complex() else dtype}")
    x = x.detach()
    if out is None:
        out = torch.empty_like(
            x, dtype=dtype, memory_format=torch.preserve_format if memory_format is None else memory_format
        )
    else:
        _check_out(x, out, dtype, memory_format)
    _copy(x.device, x, out)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


def _check_out(x: Tensor, out: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out has to be a tensor, and is {type(out).__name__}")
    if out.is_complex():
        raise TypeError(f"detach_copy takes no complex tensors; out is {out.dtype}")
    if dtype is not None or memory_format is not None:
        raise ValueError("out already says the dtype and the memory format; leave dtype and memory_format away")
    if out.shape != x.shape:
        raise ValueError(f"out has the shape {tuple(out.shape)}, x {tuple(x.shape)}")
    if out.device != x.device:
        raise ValueError(f"out is on {out.device}, x on {x.device}")
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("out requires grad: a copy into it would not be isolated; pass out.detach()")
    if not torch.compiler.is_compiling():
        from manpp_kernels.ops import _checks

        _checks.check_no_overlap([("out", 0, out)], [("x", 0, x)])
