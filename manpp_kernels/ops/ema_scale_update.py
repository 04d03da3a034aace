"""``ema_scale_update``: the EMA of many parameters, and with it the effective weights of MAN++ (arXiv 2507.16279)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from manpp_kernels import backends
from manpp_kernels._library import Operator, checked_operator, compiled_serves, in_transform
from manpp_kernels.backends import eager
from manpp_kernels.ops import _checks
from manpp_kernels.ops._checks import Rounding
from manpp_kernels.ops.ema_scale_update_backward import attach_effective_weights


def _fake(
    ema: list[Tensor],
    params: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
    scale: Tensor | None,
    bias: list[Tensor],
    *others: Any,
) -> None:
    _checks.check_no_overlap_of_views(*_written_and_read(ema, params, momentum_tensor, scale, bias))


def _written_and_read(
    ema: Sequence[Tensor], params: Sequence[Tensor], momentum: Any, scale: Tensor | None, bias: Sequence[Tensor]
) -> tuple[list[_checks.Named], list[_checks.Named]]:
    """What an update writes, and what it reads besides, by their names."""
    read: list[_checks.Named] = [("params", i, p) for i, p in enumerate(params)]
    read += [("bias", i, b) for i, b in enumerate(bias)]
    read += [(name, None, t) for name, t in (("momentum", momentum), ("scale", scale)) if isinstance(t, Tensor)]
    return [("ema", i, e) for i, e in enumerate(ema)], read


# The effective weights are written into `out` (empty where none are asked for) rather than returned: PyTorch can
# functionalise, and so compile, an operator that writes into lists of tensors, not one that also returns a list.
# `momentum_tensor`, where given, stands in for `momentum`; `seed` (int64, 0-dim) switches stochastic rounding on.
_update = Operator(
    "ema_scale_update",
    "(Tensor(a!)[] ema, Tensor[] params, float momentum, Tensor? momentum_tensor, Tensor? scale, Tensor[] bias,"
    " int[] groups, float total, Tensor? seed, Tensor(b!)[] out) -> ()",
    fake=_fake,
    eager=eager.ema_scale_update,
)

# The compiled operator with the checks of the common case. Where a case is not common nothing is written, and the
# answer is False, or no effective weights. The update alone has its own, as an argument that is passed costs a quarter
# of a microsecond.
_update_checked = checked_operator(
    "_ema_update_checked", "(Tensor(a!)[] ema, Tensor[] params, float momentum) -> bool", declined=False
)
_scale_update_checked = checked_operator(
    "_ema_scale_update_checked",
    "(Tensor(a!)[] ema, Tensor[] params, float momentum, Tensor scale, Tensor[] bias, int[] groups, float total)"
    " -> Tensor[]",
    declined=[],
)

# What a seed for stochastic rounding is drawn from: [SEED_MIN, SEED_MAX).
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A seed for stochastic rounding, by default from the device's generator: reproducible under torch.manual_seed."""
    return torch.randint(SEED_MIN, SEED_MAX, (), dtype=torch.int64, device=device, generator=generator)


class Arguments(NamedTuple):
    """The arguments of :func:`ema_scale_update`, tensors in lists."""

    ema: list[Tensor]
    params: list[Tensor]
    momentum: float | Tensor
    scale: Tensor | None
    bias: list[Tensor] | None
    groups: Sequence[int] | None
    total: float
    rounding: str
    generator: torch.Generator | None

    def on(self, device: torch.device) -> Arguments:
        """Those of the tensors on one device."""
        chosen = [i for i, e in enumerate(self.ema) if e.device == device]

        def pick(values: Any) -> Any:
            return None if values is None else [values[i] for i in chosen]

        return self._replace(
            ema=pick(self.ema), params=pick(self.params), bias=pick(self.bias), groups=pick(self.groups)
        )


@overload
def ema_scale_update(
    ema: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    momentum: float | Tensor,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> None: ...
@overload
def ema_scale_update(
    ema: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    momentum: float | Tensor,
    *,
    scale: Tensor,
    bias: Tensor | Sequence[Tensor],
    groups: Sequence[int] | None = None,
    total: float = 2.0,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> list[Tensor]: ...
def ema_scale_update(
    ema: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    momentum: float | Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    groups: Sequence[int] | None = None,
    total: float = 2.0,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> list[Tensor] | None:
    """Move an exponential moving average one step, in place: ``ema = momentum * ema + (1 - momentum) * params``.

    The EMA parameter copy of MAN (ECCV 2024) and MAN++ (arXiv 2507.16279), for any number of tensors in one launch.
    With ``scale`` and ``bias`` the same pass also yields the effective weights of MAN++'s parameter form,
    ``w[i] = scale[g] * bias[i] + (total - scale[g]) * ema[i]``, from the EMA as just stored, with ``g = groups[i]``.

    The update is outside autograd. The effective weights are differentiable in ``scale`` and ``bias`` (twice), not in
    ``ema`` or ``params``. Arithmetic is in float32, in float64 for a pair (or triple) that has a float64 tensor.

    Args:
        ema: a tensor or a sequence of tensors of float64, float32, bfloat16 or float16; written in place.
        params: pairwise of the same shape and device; any of the four dtypes, which may differ from ema's.
        momentum: a float in [0, 1], or a 0-dim floating tensor on ema's device, whose value is read on the device
            alone (for schedules under CUDA graphs) and therefore not checked.
        scale: 0-dim, or one entry per group, on ema's device. Comes together with ``bias``.
        bias: pairwise of the same shape and device as ema. Comes together with ``scale``.
        groups: for each tensor the entry of ``scale`` that it takes, an integer (Python's or NumPy's); may be left away
            where scale has one entry.
        total: what the two coefficients sum to; 2 as published.
        rounding: how bfloat16 and float16 EMAs are stored. ``"stochastic"`` rounds up or down at random with the odds
            that make the mean exact, reproducible under :func:`torch.manual_seed`. With ``"nearest"`` a bfloat16 EMA
            of a high momentum stops moving once its steps are smaller than half its resolution.
        generator: what stochastic rounding draws from, on ema's device; the default generator if None.

    Returns:
        None, or with ``scale`` and ``bias`` the effective weights, a list of tensors like ``bias``. Where gradients are
        recorded they are not to be modified in place.

    Raises:
        TypeError: an entry is not a dense floating tensor, momentum or total not a number, or a group not an integer.
        ValueError: lists of different length; shapes or devices that differ; momentum outside [0, 1] or NaN; scale
            without bias or bias without scale; an ema that overlaps another tensor in memory; an unknown rounding.
        IndexError: a group out of range.
        RuntimeError: an ema that requires grad while gradients are recorded; effective weights under a transform of
            ``torch.func`` or in forward mode; a call under ``torch.jit.trace``.

        All of them are raised before anything is written, and name the argument, the index and what was found. In a
        compiled function they are raised when it is traced: arguments of it that overlap in a later call alone, and
        overlapping tensors with gaps, are not noticed there, and the results are wrong.
    """
    ema, params = _checks.as_list("ema", ema), _checks.as_list("params", params)
    biases = None if bias is None else _checks.as_list("bias", bias)
    groups = _checks.as_groups(groups)
    if rounding == "nearest" and not torch.compiler.is_compiling():
        done, out = _common_case(ema, params, momentum, scale, biases, groups, total)
        if done:
            # Autograd must know of a write it did not see, or a graph that saved the old EMA would use the new one.
            torch.autograd.graph.increment_version(ema)
            return _finish(ema, scale, biases, groups, total, out)
    arguments = Arguments(ema, params, momentum, scale, biases, groups, total, rounding, generator)
    check_arguments(arguments)
    out = None if biases is None else [torch.empty_like(b.detach()) for b in biases]
    for device in {e.device for e in ema}:
        _update_on(device, arguments.on(device), [w for w in out or () if w.device == device])
    return _finish(ema, scale, biases, groups, total, out)


def _common_case(
    ema: list[Tensor],
    params: list[Tensor],
    momentum: float | Tensor,
    scale: Tensor | None,
    bias: list[Tensor] | None,
    groups: list[int] | None,
    total: float,
) -> tuple[bool, list[Tensor] | None]:
    """Does the update where a compiled backend can, checking as it goes; (False, None), nothing written, elsewhere.

    Checked in Python, a hundred tensors cost four times as much as the update of their elements.
    """
    if (
        type(momentum) is not float
        or not 0.0 <= momentum <= 1.0
        or type(total) is not float
        or not math.isfinite(total)
        or (scale is None) != (bias is None)
        or (groups is not None and (scale is None or len(groups) != len(ema)))
        or not compiled_serves(ema, params, bias or (), () if scale is None else (scale,))
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(ema))
    ):
        return False, None
    if scale is None or bias is None:
        return _update_alone(ema, params, momentum), None
    try:
        out = _scale_update_checked(ema, params, momentum, scale.detach().contiguous(), bias, groups or [], total)
    except NotImplementedError:  # sparse tensors
        return False, None
    except RuntimeError:
        if all(-(2**63) <= group < 2**63 for group in groups or ()):
            raise
        return False, None  # a group that the dispatcher has no integer for
    return bool(out), out


def _update_alone(ema: Sequence[Tensor], params: Sequence[Tensor], momentum: float) -> bool:
    try:
        return _update_checked(ema, params, momentum)
    except NotImplementedError:  # sparse tensors
        return False


def update_common_case(ema: Sequence[Tensor], params: Sequence[Tensor], momentum: float) -> bool:
    """The update alone, whether gradients are recorded or not, rounding to nearest, where it is the common case.

    False, with nothing written, elsewhere.
    """
    if torch.compiler.is_compiling() or not compiled_serves(ema, params):
        return False
    done = _update_alone(ema, params, momentum)
    if done:
        torch.autograd.graph.increment_version(ema)
    return done


def _finish(
    ema: list[Tensor],
    scale: Tensor | None,
    bias: list[Tensor] | None,
    groups: Sequence[int] | None,
    total: float,
    out: list[Tensor] | None,
) -> list[Tensor] | None:
    """What follows an update: the effective weights get their place in the graph."""
    if bias is None or out is None or scale is None:
        return None
    return attach_effective_weights(out, scale, bias, ema, list(groups or ()), float(total))


def check_arguments(a: Arguments) -> None:
    """Everything that can be wrong with them."""
    _checks.check_tensors("ema", a.ema)
    _checks.check_tensors("params", a.params, a.ema)
    if a.bias is not None:
        _checks.check_tensors("bias", a.bias, a.ema)
    _checks.check_scale(a.scale, a.bias, a.groups, a.total, len(a.ema))
    _checks.check_rounding(a.rounding)
    compiling = torch.compiler.is_compiling()
    if not compiling and any(map(torch._C._functorch.is_functorch_wrapped_tensor, (*a.ema, *a.params))):
        raise RuntimeError("a transform of torch.func sees no write in place; update the EMA outside of it")
    if not compiling and torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace does not record the update; update the EMA outside, or use torch.compile")
    if a.bias is not None:
        check_no_transform(a.scale, a.bias)
    devices = {e.device for e in a.ema}
    for device in devices:
        if not compiling:
            backends.override(device)  # a backend that cannot serve one of several devices is an error before the first
        _checks.check_momentum(a.momentum, device)
        if a.scale is not None and a.scale.device != device:
            raise ValueError(f"scale is on {a.scale.device}, and there are ema tensors on {device}")
        if a.generator is not None and a.rounding == "stochastic":
            _checks.check_generator(a.generator, device)
    if not devices:
        _checks.check_momentum(a.momentum, a.momentum.device if isinstance(a.momentum, Tensor) else torch.device("cpu"))
    _checks.check_writable(a.ema)
    if not compiling:
        _checks.check_no_overlap(*_written_and_read(a.ema, a.params, a.momentum, a.scale, a.bias or ()))


def check_no_transform(scale: Tensor | None, bias: list[Tensor]) -> None:
    """Raise where a transform wants the derivative of the effective weights, and would take it for zero."""
    forward_ad = torch.autograd.forward_ad
    dual = forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in (scale, *bias)
    )
    if dual or in_transform():
        raise RuntimeError(
            "the effective weights are not differentiable by torch.func or in forward mode, which see no write in "
            "place; use torch.autograd, or update the EMA first and compute the weights inside the transform"
        )


def _update_on(device: torch.device, a: Arguments, out: list[Tensor]) -> None:
    """One launch, of tensors that are all on ``device``."""
    _update(
        device,
        [e.detach() for e in a.ema],
        [p.detach() for p in a.params],
        *_checks.split_momentum(a.momentum),
        None if a.scale is None else a.scale.detach().contiguous(),
        [b.detach() for b in a.bias or ()],
        list(a.groups or ()),
        float(a.total),
        draw_seed(device, a.generator) if a.rounding == "stochastic" else None,
        out,
    )
