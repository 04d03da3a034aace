"""``EmaPlan``: the tables of a launch of ``ema_scale_update``, built once and used every step."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manpp_kernels import backends
from manpp_kernels._library import library
from manpp_kernels.ops import _checks
from manpp_kernels.ops import ema_scale_update as op
from manpp_kernels.ops.ema_scale_update_backward import attach_effective_weights

# Builds a plan in the compiled library and returns its address; 0 where an operand's layout needs a copy every step.
library.define(
    "_plan_create(Tensor[] ema, Tensor[] params, Tensor[] bias, int[] groups, float total, Tensor[] out) -> int"
)


# Lazily negated views, of which the memory is not the value; not by way of copies, whose addresses would be kept.
library.impl("_plan_create", lambda *_: 0, "Negative")


_MOST_GROUP = 2**31 - 1  # that a launch has room for; of an operator, scale is there to compare with


@dataclasses.dataclass(frozen=True)
class _Lists:
    """What a plan was built for; bias, groups and weights are empty without effective weights."""

    ema: list[Tensor]
    params: list[Tensor]
    bias: list[Tensor]
    groups: list[int]
    total: float
    weights: list[Tensor]


class _CompiledLaunch:
    """By the compiled library, which keeps the tables and watches the tensors itself."""

    def __init__(self, lists: _Lists, address: int) -> None:
        from manpp_kernels import _C, _plan

        functions = ctypes.CDLL(_C.__file__)
        names = ("manpp_plan_update", "manpp_plan_error", "manpp_plan_delete")
        update, error, destroy = (ctypes.cast(getattr(functions, name), ctypes.c_void_p).value or 0 for name in names)
        self._plan = _plan.Plan(address, update, error, destroy)
        self.update = self._plan.update  # with a momentum and nothing else

    @staticmethod
    def build(lists: _Lists) -> _CompiledLaunch | None:
        if not backends.PLANS_COMPILED:
            return None
        address = torch.ops.manpp_kernels._plan_create(
            lists.ema, lists.params, lists.bias, lists.groups, lists.total, lists.weights
        )
        return _CompiledLaunch(lists, address) if address else None

    def run(self, momentum: float | Tensor, scale: Tensor | None, seed: Tensor | None) -> bool:
        value, tensor = _checks.split_momentum(momentum)
        return self._plan.update_with(
            value,
            0 if tensor is None else tensor.data_ptr(),
            0 if tensor is None else _checks.DTYPE_NUMBERS[tensor.dtype],
            0 if scale is None else scale.data_ptr(),
            0 if scale is None else _checks.DTYPE_NUMBERS[scale.dtype],
            0 if seed is None else seed.data_ptr(),
        )


def _stream(device: torch.device) -> int:
    """The stream that a launch goes to now, as a number."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _TritonLaunch:
    """By Triton, with its table kept on the device; the tensors are watched from here."""

    update = None

    def __init__(self, lists: _Lists) -> None:
        self._lists = lists
        self._tensors = [*lists.ema, *lists.params, *lists.bias, *lists.weights]
        self._seen = self._look()
        self._built = False

    def _look(self) -> list[Any]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]

    def _holds(self, t: float | Tensor | None) -> bool:
        """Whether what an update writes holds ``t`` in its memory, and would change it."""
        written = (*self._lists.ema, *self._lists.weights)
        return isinstance(t, Tensor) and any(_checks.share_memory(w, t) for w in written)

    def run(self, momentum: float | Tensor, scale: Tensor | None, seed: Tensor | None) -> bool:
        if self._look() != self._seen or self._holds(momentum) or self._holds(scale):
            return False
        from manpp_kernels.backends.triton.ema_scale_update import build_table, launch

        lists, device = self._lists, self._tensors[0].device
        capturing = backends.is_capturing(device)
        if not self._built:
            # A table that is built inside a capture is written when that graph runs: of use to no other launch.
            self._table = build_table(lists.ema, lists.params, lists.bias, lists.weights, lists.groups)
            self._built = not capturing
            self._stream = _stream(device)
        elif self._table is not None and (capturing or _stream(device) != self._stream):
            for t in (self._table.buffer, *self._table.keep):
                backends.keep_while_used(t)
        value, tensor = _checks.split_momentum(momentum)
        launch(self._table, value, tensor, scale, lists.total, seed)
        return True


class _OperatorLaunch:
    """By the operator: where there is nothing to prepare, or a layout needs a copy at every step."""

    update = None

    def __init__(self, lists: _Lists) -> None:
        self._lists = lists

    def run(self, momentum: float | Tensor, scale: Tensor | None, seed: Tensor | None) -> bool:
        lists = self._lists
        if lists.ema:
            op._update(
                lists.ema[0].device,
                [e.detach() for e in lists.ema],
                [p.detach() for p in lists.params],
                *_checks.split_momentum(momentum),
                scale,
                [b.detach() for b in lists.bias],
                lists.groups,
                lists.total,
                seed,
                lists.weights,
            )
        return True


_Launch = _CompiledLaunch | _TritonLaunch | _OperatorLaunch


class EmaPlan:
    """An EMA update of fixed lists of tensors, prepared once: the fast form of :func:`manpp_kernels.ema_scale_update`.

    An update costs microseconds on the host (of a GPU 9 to 13 for ten tensors, 130 to 140 for a thousand), allocates
    nothing and never waits for the device; it can be captured in a CUDA graph. A plan notices a tensor whose memory
    has moved (an assignment to ``.data``, ``module.to()``, ``resize_``), builds itself anew and carries on: it never
    writes through an address that has gone stale. (Inside a CUDA graph the addresses are those of the capture.)
    What takes a tensor's place in a module (``load_state_dict(assign=True)``, a new layer) it does not know of: build
    another plan then. :class:`manpp_kernels.ModelEma` looks at its model anew in every update.
    Whether an EMA requires grad, which is an error while gradients are recorded, a plan without ``bias`` asks when it
    is built: asking takes as long as the update. The references that it keeps let ``torch.utils.swap_tensors``
    refuse.

    Args:
        ema, params, bias, groups, total, rounding, generator: as for :func:`manpp_kernels.ema_scale_update`. The plan
            keeps references to the tensors. ``bias`` asks for effective weights, whose scale comes with every update.

    Attributes:
        weights: the effective weights, None without ``bias``. They stand at fixed addresses: every update overwrites
            them, so a graph that uses them has to have run its backward pass by then (autograd checks that it has).
            (Where an input has come to share their memory, as by ``bias.data = weight``, new ones take their place.)
            A CUDA graph writes them at every replay: keep them, or the plan, for as long as it is replayed.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`manpp_kernels.ema_scale_update`, and ValueError for
            tensors on more than one device.
    """

    def __init__(
        self,
        ema: Tensor | Sequence[Tensor],
        params: Tensor | Sequence[Tensor],
        *,
        bias: Tensor | Sequence[Tensor] | None = None,
        groups: Sequence[int] | None = None,
        total: float = 2.0,
        rounding: _checks.Rounding = "nearest",
        generator: torch.Generator | None = None,
    ) -> None:
        self.ema, self.params = _checks.as_list("ema", ema), _checks.as_list("params", params)
        self.bias = None if bias is None else _checks.as_list("bias", bias)
        groups = _checks.as_groups(groups, most=_MOST_GROUP)
        self.groups = None if groups is None else groups.copy()
        _checks.check_total(total)
        self.total, self.rounding, self.generator = float(total), rounding, generator
        self.weights: list[Tensor] | None = None
        self._build()

    def _build(self, momentum: float | Tensor = 0.0, scale: Tensor | None = None) -> None:
        """Checks the tensors as they are now, and forgets what was prepared for where they were."""
        # How many entries scale has shows at every update, and is compared with this.
        self._entries = max(1, 1 + max(self.groups or (), default=0))
        if self.bias is not None and scale is None:
            on = self.ema[0].device if self.ema and isinstance(self.ema[0], Tensor) else None
            scale = torch.empty((), device=on).expand(self._entries)
        with torch.no_grad():  # whether ema may be written is asked at an update
            op.check_arguments(
                op.Arguments(
                    self.ema,
                    self.params,
                    momentum,
                    scale,
                    self.bias,
                    self.groups,
                    self.total,
                    self.rounding,
                    self.generator,
                )
            )
        devices = {e.device for e in self.ema}
        if len(devices) > 1:
            raise ValueError(f"a plan works on one device, and there are ema tensors on {sorted(map(str, devices))}")
        self.device = next(iter(devices), torch.device("cpu"))
        if self.bias is not None and not self._weights_fit(self.bias, momentum, scale):
            with torch.inference_mode(False):  # what is made there stays of no use elsewhere
                self.weights = [torch.empty_like(b, requires_grad=False) for b in self.bias]
        self._seed: Tensor | None = None
        if self.rounding == "stochastic":
            with torch.inference_mode(False):
                self._seed = torch.empty((), dtype=torch.int64, device=self.device)
        self._requires_grad = any(e.requires_grad for e in self.ema)
        self._written, self._asked = self.ema + (self.weights or []), self.ema + (self.bias or [])
        self._launch: _Launch | None = None  # built at the first update, for the backend in force by then
        self._update_alone: Any = None  # the launch's short way, where an update is a momentum and nothing else

    def _weights_fit(self, bias: list[Tensor], momentum: float | Tensor, scale: Tensor | None) -> bool:
        """Whether the weights can stay at their addresses although something moved, perhaps into them."""
        if self.weights is None or not all(
            w.shape == b.shape and w.dtype == b.dtype and w.device == b.device and not _checks.freed(w)
            for w, b in zip(self.weights, bias, strict=True)
        ):
            return False
        written: list[_checks.Named] = [("weights", i, w) for i, w in enumerate(self.weights)]
        others = (*self.ema, *self.params, *bias, *(t for t in (momentum, scale) if isinstance(t, Tensor)))
        try:
            _checks.check_no_overlap(written, [("another", i, t) for i, t in enumerate(others)])
        except _checks.OverlapError:
            return False
        return True

    def _prepare(self) -> _Launch:
        """Builds the launch for the backend in force."""
        self._backend = backends.override(self.device)
        lists = _Lists(self.ema, self.params, self.bias or [], self.groups or [], self.total, self.weights or [])
        selected = backends.selected(self.device)
        launch: _Launch | None = None
        if selected in ("cpu", "cuda"):
            launch = _CompiledLaunch.build(lists)
        elif selected == "triton" and not any(t.is_neg() for t in (*lists.params, *lists.bias)):
            launch = _TritonLaunch(lists)
        self._launch = _OperatorLaunch(lists) if launch is None else launch
        self._update_alone = self._launch.update if self.bias is None and self._seed is None else None
        return self._launch

    def update(self, momentum: float | Tensor, scale: Tensor | None = None) -> list[Tensor] | None:
        """Move the EMA one step, in place; with ``bias``, compute the effective weights in the same pass.

        Args:
            momentum: a float in [0, 1], or a 0-dim floating tensor on the device, whose value is not checked.
            scale: 0-dim, or one entry per group; exactly where the plan has ``bias``.

        Returns:
            None, or the effective weights: :attr:`weights`, as differentiable functions of scale and bias.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as :func:`manpp_kernels.ema_scale_update`, of momentum and
                scale, and of tensors that have changed since the plan was built. Nothing was written.
        """
        # The common case first: every attribute looked up here is host time of every training step.
        if (
            self._update_alone is not None
            and not (self._requires_grad and torch.is_grad_enabled())
            and type(momentum) is float
            and 0.0 <= momentum <= 1.0
            and scale is None
            and backends.override(self.device) == self._backend
            and self._update_alone(momentum)
        ):
            torch._C._increment_version(self.ema)
            return None
        return self._update(momentum, scale)

    def _scale_fits(self, scale: Tensor | None) -> bool:
        """Whether scale is as it mostly is; asking for every group takes longer than to update small tensors."""
        return (
            isinstance(scale, Tensor)
            and self.bias is not None
            and scale.dtype in _checks.DTYPE_NUMBERS
            and scale.layout == torch.strided
            and scale.device == self.device
            and scale.dim() <= 1
            and (scale.numel() >= self._entries if self.groups is not None else scale.numel() == 1)
        )

    def _update(self, momentum: float | Tensor, scale: Tensor | None) -> list[Tensor] | None:
        if not self.ema:  # of no device: whatever backend is in force, and wherever the scale is
            _checks.check_momentum(momentum, momentum.device if isinstance(momentum, Tensor) else self.device)
            _checks.check_scale(scale, self.bias, self.groups, self.total, 0)
            return self.weights
        _checks.check_momentum(momentum, self.device)
        if not self._scale_fits(scale):
            _checks.check_scale(scale, self.bias, self.groups, self.total, len(self.ema))
            if scale is not None and scale.device != self.device:
                raise ValueError(f"scale is on {scale.device}, ema on {self.device}")
        if self.bias is not None:
            op.check_no_transform(scale, self.bias)
        without = isinstance(momentum, Tensor) and momentum.data_ptr() == 0
        if without or (scale is not None and scale.data_ptr() == 0):
            self._build(momentum, scale)  # which says that it has no memory
        # One question for all tensors, which may come to require grad at any time: put one by one, it would take as
        # long as the launch.
        grad = torch.is_grad_enabled() and torch._C._any_requires_grad(self._asked, scale)
        if grad:
            _checks.check_writable(self.ema)
        launch = self._launch
        if launch is None or isinstance(launch, _OperatorLaunch) or backends.override(self.device) != self._backend:
            # Also for the operator, each time: it is called on tensors that may have changed meanwhile.
            self._build(momentum, scale)
            launch = self._prepare()
        if self._seed is not None:
            backends.keep_while_used(self._seed)
            self._seed.random_(op.SEED_MIN, op.SEED_MAX, generator=self.generator)
        ran = launch.run(
            momentum.detach().resolve_neg() if isinstance(momentum, Tensor) else momentum,
            None if scale is None else scale.detach().contiguous().resolve_neg(),
            self._seed,
        )
        if not ran:  # a tensor has moved, perhaps to another device, or is in the way of another: all over again
            self._build(momentum, scale)
            return self._update(momentum, scale)
        torch.autograd.graph.increment_version(self._written)
        if not grad or self.weights is None or self.bias is None or scale is None:
            return self.weights
        return attach_effective_weights(self.weights, scale, self.bias, self.ema, self.groups or [], self.total)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmaPlan:
        raise TypeError("an EmaPlan stands for the tensors it was built on; build another on the copies")

    def __reduce__(self) -> Any:
        raise TypeError("an EmaPlan holds addresses and cannot be pickled; build it where it is used")
