"""What the operators demand of their arguments, checked before anything is written.

Each message names the argument, its index in the list, and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from manpp_kernels._library import PLAIN

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = get_args(Rounding)
EMA_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# By which the compiled library knows them (DType in csrc/multi_tensor.h).
DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(EMA_DTYPES)}


def as_list(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """A tensor alone, or any iterable of tensors, as a list."""
    if type(tensors) is list:  # the usual case; asking what else it might be takes as long as a small update
        return tensors.copy()
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name} has to be a tensor or a sequence of tensors, and is {type(tensors).__name__}")
    return list(tensors)


def as_groups(groups: Iterable[int] | None, most: int | None = None) -> list[int] | None:
    """Any iterable of integers, NumPy's included, as a list of int; none of them above ``most``, if given."""
    if groups is None:
        return None
    if type(groups) is not list or not {int}.issuperset(map(type, groups)):
        try:
            entries = list(groups)
        except TypeError:  # also for a NumPy array without dimensions
            raise TypeError(f"groups has to be a sequence of ints, and is {type(groups).__name__}") from None
        groups = [_as_group(i, group) for i, group in enumerate(entries)]
    for i, group in enumerate(groups) if most is not None else ():
        if group > most:
            raise IndexError(f"groups[{i}] is {group}, and no scale has so many entries")
    return groups


def _as_group(i: int, group: Any) -> int:
    if not isinstance(group, Integral) or isinstance(group, bool):
        # A tensor may be on a device, and would have to be waited for.
        hint = "; pass the .tolist() of a tensor" if isinstance(group, Tensor) else ""
        raise TypeError(f"groups[{i}] has to be an int, and is {type(group).__name__}{hint}")
    return int(group)


def check_tensor(name: str, t: Tensor, i: int | None = None) -> None:
    """A dense tensor of one of the four floating dtypes; ``i`` is its index, if it is one of a list."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{_label(name, i)} has to be a tensor, and is {type(t).__name__}")
    if t.dtype not in EMA_DTYPES:
        raise TypeError(f"{_label(name, i)} has to be float64, float32, bfloat16 or float16, and is {t.dtype}")
    check_dense(_label(name, i), t)


def check_dense(name: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        raise TypeError(f"{name} has to be a dense tensor, and its layout is {t.layout}")
    if t.is_nested:
        raise TypeError(f"{name} has to be a dense tensor, and is a nested one")


def _label(name: str, i: int | None) -> str:
    return name if i is None else f"{name}[{i}]"


def check_total(total: float) -> None:
    """A finite number."""
    if not _is_number(total):
        raise TypeError(f"total has to be a float, and is {type(total).__name__}")
    if not -math.inf < total < math.inf:  # False for NaN too; unlike isfinite, torch.compile can trace it
        raise ValueError(f"total has to be finite, and is {total}")


def check_tensors(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> None:
    """Every entry is a dense tensor of a floating dtype; with ``like``, pairwise of the same shape and device."""
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{name} has {len(tensors)} tensors and ema has {len(like)}; they go in pairs")
    for i, t in enumerate(tensors):
        check_tensor(name, t, i)
        if like is not None:
            if t.shape != like[i].shape:
                raise ValueError(f"{name}[{i}] has the shape {tuple(t.shape)}, ema[{i}] {tuple(like[i].shape)}")
            if t.device != like[i].device:
                raise ValueError(f"{name}[{i}] is on {t.device}, ema[{i}] on {like[i].device}")


def _is_number(value: Any) -> bool:
    """NumPy's are, truth values are not."""
    # Most are of the one class: asking an abstract one takes as long as the update of a few small tensors.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def check_number(name: str, value: Any) -> None:
    """Raise where it is no number."""
    if not _is_number(value):
        raise TypeError(f"{name} has to be a number, and is {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raise where it is no number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:  # False for NaN too
        raise ValueError(f"{name} has to lie in [0, 1], and is {value}")


def check_momentum(momentum: float | Tensor, device: torch.device) -> None:
    """A number in [0, 1], or a 0-dim floating tensor on ``device`` (whose value stays on the device, unread)."""
    if isinstance(momentum, Tensor):
        check_tensor("momentum", momentum)
        if momentum.dim() != 0:
            raise ValueError(f"momentum as a tensor has to be 0-dim, and has the shape {tuple(momentum.shape)}")
        if momentum.device != device:
            raise ValueError(f"momentum is on {momentum.device}, ema on {device}; pass a float or move it")
    elif not _is_number(momentum):
        raise TypeError(f"momentum has to be a float or a 0-dim tensor, and is {type(momentum).__name__}")
    else:
        check_fraction("momentum", momentum)


def check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding has to be one of {', '.join(ROUNDINGS)}, and is {rounding!r}")


def split_momentum(momentum: float | Tensor) -> tuple[float, Tensor | None]:
    """As the operators take it: a number, which counts where there is no tensor."""
    return (0.0, momentum.detach()) if isinstance(momentum, Tensor) else (float(momentum), None)


def check_scale(
    scale: Tensor | None, bias: Sequence[Tensor] | None, groups: Sequence[int] | None, total: float, count: int
) -> None:
    """``scale`` and ``bias`` come together; every group is an index into ``scale``."""
    if (scale is None) != (bias is None):
        missing = "bias" if bias is None else "scale"
        raise ValueError(f"scale and bias come together, and {missing} is missing")
    check_total(total)
    if scale is None:
        if groups is not None:
            raise ValueError("groups say which entry of scale a tensor takes, and there is no scale")
        return
    check_tensor("scale", scale)
    if scale.dim() > 1:
        raise ValueError(f"scale has to be 0-dim or one entry per group, and has the shape {tuple(scale.shape)}")
    if groups is None:
        if scale.numel() != 1:
            raise ValueError(f"scale has {scale.numel()} entries, so groups has to say which one each tensor takes")
        return
    if len(groups) != count:
        raise ValueError(f"groups has {len(groups)} entries and ema has {count}; they go in pairs")
    for i, group in enumerate(groups):
        if not 0 <= group < scale.numel():
            raise IndexError(f"groups[{i}] is {group}, and scale has {scale.numel()} entries")


def check_generator(generator: torch.Generator, device: torch.device) -> None:
    """A random number generator for ``device``."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator has to be a torch.Generator, and is {type(generator).__name__}")
    made_for = generator.device
    if made_for.type != device.type or made_for.index not in (None, device.index):
        raise ValueError(f"generator is for {generator.device}, and ema is on {device}")


def check_writable(ema: Sequence[Tensor]) -> None:
    """In-place writing is allowed: no entry requires grad while gradients are recorded."""
    if torch.is_grad_enabled():
        for i, t in enumerate(ema):
            if t.requires_grad:
                raise RuntimeError(
                    f"ema[{i}] requires grad and would be written in place; call under torch.no_grad(), or keep the "
                    "EMA in tensors that do not require grad"
                )


Named = tuple[str, int | None, Tensor]  # the index of one in a list
Span = tuple[Any, Any, bool, str, Tensor]  # where it starts and ends, whether it is written, its name


class OverlapError(ValueError):
    """A tensor to be written shares memory with another."""


def _extent(t: Tensor) -> int:
    """How many bytes of memory lie between the first and past the last element of ``t``."""
    if t.is_contiguous():
        return t.numel() * t.element_size()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _bytes_of(t: Tensor, start: int, end: int) -> Tensor:
    """A mask over the bytes [start, end): those that belong to ``t``."""
    mask = torch.zeros(end - start, dtype=torch.bool, device="cpu")
    size = t.element_size()
    stride = [s * size for s in t.stride()] + [1]
    mask.as_strided([*t.shape, size], stride, t.data_ptr() - start).fill_(True)
    return mask


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share a byte, given that the stretches of memory they lie in do."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    start = min(a.data_ptr(), b.data_ptr())
    end = max(a.data_ptr() + _extent(a), b.data_ptr() + _extent(b))
    return bool((_bytes_of(a, start, end) & _bytes_of(b, start, end)).any())


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share a byte."""
    meet = a.data_ptr() < b.data_ptr() + _extent(b) and b.data_ptr() < a.data_ptr() + _extent(a)
    return meet and _overlap(a, b)


def check_no_overlap(written: Iterable[Named], read: Iterable[Named]) -> None:
    """No written tensor shares memory with another written one, with itself, or with one that is read.

    Of tensors whose storage was freed there is nothing to compare: they are an error, too.
    """
    spans: list[Span] = []
    for is_written, named in ((True, written), (False, read)):
        for argument, i, t in named:
            name = _label(argument, i)
            if t.numel() and _has_memory(t):
                if is_written and t.is_neg():
                    raise TypeError(f"{name} is a lazily negated view, and cannot be written; pass its .resolve_neg()")
                if is_written and not t.is_contiguous():
                    _check_no_internal_overlap(name, t)
                if t._is_zerotensor():
                    raise TypeError(f"{name} is a ZeroTensor, which has no memory; pass its .clone()")
                start = t.data_ptr()
                if start == 0 and hasattr(t, "to_local"):
                    raise TypeError(f"{name} is a {type(t).__name__}, sharded over ranks; pass its to_local()")
                if start == 0 and type(t) not in PLAIN:
                    raise TypeError(f"{name} is a {type(t).__name__}, which has no memory; pass what it is made of")
                if start == 0 or freed(t):
                    raise _no_memory(name)
                spans.append((start, start + _extent(t), is_written, name, t))
    _check_apart(spans, _overlap)


def check_no_overlap_of_views(written: Iterable[Named], read: Iterable[Named]) -> None:
    """The same for fake and meta tensors, which have no addresses, but know of which storage they are views.

    So are those that torch.compile traces. Tensors with gaps, or of a size that depends on data, are let through.
    """
    spans: list[Span] = []
    for is_written, named in ((True, written), (False, read)):
        for argument, i, t in named:
            dim = t.dim()
            start, *rest = [_traced(n) for n in (t.storage_offset(), *t.shape, *t.stride())]
            shape, stride, size = rest[:dim], rest[dim:], t.element_size()
            if None in (start, *rest) or math.prod(shape) == 0:
                continue
            reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            if is_written and reach < math.prod(shape):
                raise _shares_with_itself(_label(argument, i), t)
            if reach == math.prod(shape):
                storage = t.untyped_storage()._cdata
                begin, end = (storage, start * size), (storage, (start + reach) * size)
                spans.append((begin, end, is_written, _label(argument, i), t))
    _check_apart(spans, lambda a, b: True)


def _traced(n: int | torch.SymInt) -> Any:
    """A size as it is in the call that is being traced, without tying the trace to it; None where it is not known."""
    if isinstance(n, int):
        return n
    return n.node.hint if n.node.has_hint() else None


def _check_apart(spans: list[Span], overlap: Callable[[Tensor, Tensor], bool]) -> None:
    """Raise where a span that is written meets another; ``overlap`` says whether the tensors of two that meet do."""
    spans.sort(key=lambda span: span[0])
    live: list[Span] = []  # those that reach past the one at hand
    for span in spans:
        live = [other for other in live if other[1] > span[0]]
        for other in live:
            # Spans may interleave without sharing a byte (two columns of one matrix): only then look at every byte.
            if (span[2] or other[2]) and overlap(span[4], other[4]):
                first, second = (span, other) if span[2] else (other, span)
                raise OverlapError(f"{first[3]} overlaps {second[3]} in memory")
        live.append(span)


def freed(t: Tensor) -> bool:
    """Whether the storage of a plain tensor was freed. The address of a view of it need not be 0 then."""
    return t.numel() > 0 and type(t) in PLAIN and t.untyped_storage().nbytes() == 0


def _no_memory(name: str) -> ValueError:
    return ValueError(f"{name} has no memory: its storage was freed (by resize_(0), or by FSDP)")


def check_not_freed(name: str, t: Tensor) -> None:
    """Where nothing else looks at the memory of ``t``: kernels, PyTorch's too, would read at address 0."""
    if _has_memory(t) and not t._is_zerotensor() and freed(t):
        raise _no_memory(name)


def _has_memory(t: Tensor) -> bool:
    # What traces with meta and fake tensors checks the real ones where it runs. Those of torch.func wrap others.
    return not (t.is_meta or isinstance(t, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(t))


def _check_no_internal_overlap(name: str, t: Tensor) -> None:
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            # Dimensions may interleave without sharing an element, which counting them shows.
            if stride <= reach and _bytes_of(t, t.data_ptr(), t.data_ptr() + _extent(t)).sum() < t.nbytes:
                raise _shares_with_itself(name, t)
            reach += (size - 1) * stride


def _shares_with_itself(name: str, t: Tensor) -> ValueError:
    return ValueError(
        f"{name} has elements that share memory (strides {t.stride()} for the shape {tuple(t.shape)}); pass a .clone()"
    )
