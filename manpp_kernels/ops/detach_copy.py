"""``detach_copy``: a gradient-isolated copy, cast and laid out anew in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from manpp_kernels import backends
from manpp_kernels._library import PLAIN, Operator, checked_operator, transformed, undisturbed
from manpp_kernels.backends import eager
from manpp_kernels.ops import _checks


def _fake(x: Tensor, out: Tensor) -> None:
    _checks.check_no_overlap_of_views([("out", None, out)], [("x", None, x)])


_copy = Operator("detach_copy", "(Tensor x, Tensor(a!) out) -> ()", fake=_fake, eager=eager.detach_copy)

# The compiled operator with the checks of the common case; False, with nothing written, where a case is not common.
_copy_checked = checked_operator("_detach_copy_checked", "(Tensor x, Tensor(a!) out) -> bool", declined=False)


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
        TypeError: ``x`` or ``out`` is not a dense tensor of such a dtype; ``dtype`` or ``memory_format`` is none.
        ValueError: ``out`` does not fit ``x``, overlaps it, or comes together with ``dtype`` or ``memory_format``;
            ``x`` has not the dimensions that ``memory_format`` needs, or its storage was freed.
        RuntimeError: ``out`` requires grad.

        In a compiled function they are raised when it is traced: arguments of it that overlap in a later call alone,
        and overlapping tensors with gaps, are not noticed there.
    """
    if not torch.compiler.is_compiling():
        if out is None:
            new = _new_in_common_case(x, dtype, memory_format)
            if new is not None:
                return new
        elif dtype is None and memory_format is None and _into_in_common_case(x, out):
            return out
    check_tensor("x", x)
    check_options(x, dtype, memory_format)
    x = x.detach()
    by_pytorch = transformed()
    if out is None:
        layout = torch.preserve_format if memory_format is None else memory_format
        if not torch.compiler.is_compiling():
            _checks.check_not_freed("x", x)
        if by_pytorch:
            return x.to(dtype=dtype or x.dtype, memory_format=layout, copy=True)
        new = torch.empty_like(x, dtype=dtype, memory_format=layout)
        _copy(x.device, x, new)
        return new
    _check_out(x, out, dtype, memory_format)
    if by_pytorch:
        return out.copy_(x)
    _copy(x.device, x, out)
    return out


def _compiled_serves(x: Tensor) -> bool:
    return type(x) in PLAIN and undisturbed() and backends.compiled_for(x)


def _copied(x: Tensor, out: Tensor) -> bool:
    try:
        done: bool = _copy_checked(x.detach() if x.requires_grad else x, out)
    except NotImplementedError:  # sparse tensors
        return False
    return done


def _into_in_common_case(x: Tensor, out: Tensor) -> bool:
    """Makes the copy where a compiled backend can, checking as it goes; False, with nothing written, elsewhere."""
    if (
        not _compiled_serves(x)
        or type(out) not in PLAIN
        or (out.requires_grad and torch.is_grad_enabled())
        or not _copied(x, out)
    ):
        return False
    torch._C._increment_version([out])
    return True


def _new_in_common_case(
    x: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None
) -> Tensor | None:
    """A new copy, where a compiled backend can make it; None elsewhere."""
    if (
        not _compiled_serves(x)
        or x.layout is not torch.strided
        or x.is_nested
        or x.dtype not in _checks.EMA_DTYPES
        or (dtype is not None and (type(dtype) is not torch.dtype or dtype not in _checks.EMA_DTYPES))
        or (memory_format is not None and not _fits(memory_format, x))
    ):
        return None
    layout = torch.preserve_format if memory_format is None else memory_format
    new = torch.empty_like(x, dtype=dtype, memory_format=layout, requires_grad=False)
    return new if type(new) is Tensor and _copied(x, new) else None


# How many dimensions a tensor has to have to be laid out so; the other formats take any.
_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def _fits(memory_format: torch.memory_format, x: Tensor) -> bool:
    if type(memory_format) is not torch.memory_format:
        return False
    dimensions = _DIMENSIONS.get(memory_format)
    return dimensions is None or x.dim() == dimensions


# By name, as PyTorch means to give them up.
_QUANTIZED = {getattr(torch, name, None) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")}


def check_tensor(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} has to be a tensor, and is {type(t).__name__}")
    if t.is_complex():
        raise TypeError(f"{name} has to be of a real dtype, and is {t.dtype}")
    if t.is_quantized:
        raise TypeError(f"{name} is quantized, of {t.dtype}; pass its .dequantize()")
    _checks.check_dense(name, t)


def check_options(x: Tensor | None, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> None:
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype has to be a torch.dtype, and is {type(dtype).__name__}")
        if dtype.is_complex:
            raise TypeError(f"dtype has to be a real one, and is {dtype}")
        if dtype in _QUANTIZED:
            raise TypeError(f"dtype has to be a floating-point, integer or bool one, and is {dtype}")
    if memory_format is not None:
        if not isinstance(memory_format, torch.memory_format):
            raise TypeError(f"memory_format has to be a torch.memory_format, and is {type(memory_format).__name__}")
        if x is not None and not _fits(memory_format, x):
            raise ValueError(
                f"memory_format {memory_format} needs {_DIMENSIONS[memory_format]} dimensions, and x has the shape "
                f"{tuple(x.shape)}"
            )


def _check_out(x: Tensor, out: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> None:
    check_tensor("out", out)
    if dtype is not None or memory_format is not None:
        raise ValueError("out already says the dtype and the memory format; leave dtype and memory_format away")
    if out.shape != x.shape:
        raise ValueError(f"out has the shape {tuple(out.shape)}, x {tuple(x.shape)}")
    if out.device != x.device:
        raise ValueError(f"out is on {out.device}, x on {x.device}")
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("out requires grad: a copy into it would not be isolated; pass out.detach()")
    if not torch.compiler.is_compiling():
        _checks.check_no_overlap([("out", None, out)], [("x", None, x)])
