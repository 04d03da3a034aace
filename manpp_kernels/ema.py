"""Drop-ins for the EMA of a model: ``ModelEma`` for timm's, ``ema_multi_avg_fn`` for PyTorch's ``AveragedModel``."""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.ops import _checks
from manpp_kernels.ops._checks import Rounding
from manpp_kernels.ops.ema_scale_update import ema_scale_update, update_common_case
from manpp_kernels.plan import EmaPlan


def _local(t: Tensor) -> Tensor:
    """The part of a distributed tensor that is on this rank: an EMA needs no other."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(t, distributed.DTensor):
        with torch.no_grad():  # under which to_local gives the very shard, not a view of it
            return t.to_local()
    return t


def _local_pair(e: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of an EMA's tensor and the model's that are on this rank and belong together."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(p, distributed.DTensor) and not isinstance(e, distributed.DTensor):
        return e, p.full_tensor()  # an EMA made before the model was sharded: whole on every rank
    return _local(e), _local(p)


# ------------------------------------------------------------------------------------------------ ema_multi_avg_fn


def _average(
    ema: Sequence[Tensor],
    params: Sequence[Tensor],
    num_averaged: Tensor | int | None = None,
    *,
    decay: float,
    rounding: Rounding,
) -> None:
    """What ``AveragedModel`` calls for each group of parameters of one device and dtype, once it has copied them."""
    if len(ema) != len(params):
        raise ValueError(f"the averaged list has {len(ema)} tensors and the current one {len(params)}")
    # The tensors are new ones at every call, on the same memory: a plan would save little, and keep a deleted model's
    # memory. The usual group is told from others in the course of its update: a look at each tensor in Python would
    # cost as much again.
    if rounding == "nearest" and update_common_case(ema, params, decay):
        return
    _average_each(ema, params, decay, rounding)


def _real(t: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, which are averaged alike; another as it is."""
    return torch.view_as_real(t.detach()) if t.is_complex() else t


@torch.no_grad()
def _average_each(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float, rounding: Rounding) -> None:
    averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
    for e, p in zip(map(_local, ema), map(_local, params), strict=True):
        if e.is_complex() and p.is_complex():
            e, p = _real(e), _real(p)
        if e.is_floating_point():
            averaged[0].append(e)
            averaged[1].append(p)
        else:
            # A counter or mask: averaged in floating point and cut, as PyTorch's own function does.
            e.copy_(e * decay + p * (1 - decay))
    try:
        ema_scale_update(*averaged, decay, rounding=rounding)
    except _checks.OverlapError:  # views of one storage, one after the other as a loop would average them
        for e, p in zip(*averaged, strict=True):
            ema_scale_update(e, p, decay, rounding=rounding)


def ema_multi_avg_fn(
    decay: float = 0.999, *, rounding: Rounding = "nearest"
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """An EMA for ``torch.optim.swa_utils.AveragedModel``, in one launch.

    ``AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.999))`` does what it does with PyTorch's own
    ``get_ema_multi_avg_fn``: parameters (and with ``use_buffers=True`` buffers) become
    ``decay * averaged + (1 - decay) * current``; integer buffers too, cut to integers. The function can be pickled.

    Args:
        decay: in [0, 1].
        rounding: ``"stochastic"`` lets bfloat16 and float16 averages of a high decay move; see
            :func:`manpp_kernels.ema_scale_update`.

    Raises:
        TypeError: decay is not a number.
        ValueError: decay outside [0, 1] or NaN; an unknown rounding.
    """
    _checks.check_fraction("decay", decay)
    _checks.check_rounding(rounding)
    return functools.partial(_average, decay=float(decay), rounding=rounding)


# -------------------------------------------------------------------------------------------------------- ModelEma

Pair = tuple[str, Tensor, Tensor]  # name, EMA, current


def _parts(module: nn.Module, found: list[Any]) -> list[Any]:
    """Every parameter and buffer of ``module``, and None where one is not set, in order of definition."""
    found.extend(module._parameters.values())
    found.extend(module._buffers.values())
    for child in module._modules.values():
        if child is not None:
            _parts(child, found)
    return found


def _addresses(tensors: list[Any]) -> list[int]:
    try:
        return [t.data_ptr() for t in tensors if t is not None]
    except RuntimeError:  # a sparse buffer is among them, and has none
        return [t.data_ptr() for t in tensors if t is not None and t.layout == torch.strided]


class _Launches:
    """How one model is averaged into one EMA: by which plans, and what is copied instead.

    Args:
        averaged: the floating-point pairs.
        copied: the others, and all buffers where buffers are to be copied.
        rounding: of an EMA of a given dtype.
        generator: for stochastic rounding, on a given device.
    """

    def __init__(
        self,
        averaged: list[Pair],
        copied: list[Pair],
        rounding: Callable[[torch.dtype], Rounding],
        generator: Callable[[torch.device], torch.Generator],
    ) -> None:
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        self._brought: list[tuple[Tensor, Tensor]] = []
        for _, e, p in averaged:
            if e.device != p.device:
                # An EMA kept elsewhere, as on the CPU for a model on a GPU: the model is brought there first.
                with torch.inference_mode(False):  # it is written in later updates, too
                    here = torch.empty_like(p, device=e.device, requires_grad=False)
                self._brought.append((here, p))
                p = here
            lists = groups[e.device, rounding(e.dtype)]
            lists[0].append(e)
            lists[1].append(p)
        self._plans: list[EmaPlan] = []
        for (device, kind), lists in groups.items():
            build = functools.partial(
                EmaPlan, rounding=kind, generator=generator(device) if kind == "stochastic" else None
            )
            try:
                self._plans.append(build(*lists))
            except _checks.OverlapError:  # views of one storage, one after the other as a loop would average them
                self._plans += [build(*pair) for pair in zip(*lists, strict=True)]
        self._copied = [(e, p) for _, e, p in copied]

    def run(self, decay: float) -> None:
        for here, p in self._brought:
            here.copy_(p)
        for plan in self._plans:
            plan.update(decay)
        for e, p in self._copied:
            e.copy_(p)


def _forgetting(ema: ModelEma) -> Callable[[Any], None]:
    """What to do when the model is gone: let go of the plans, which keep its tensors alive."""
    this = weakref.ref(ema)

    def forget(_: Any) -> None:
        alive = this()
        if alive is not None:
            alive._forget()

    return forget


class ModelEma(nn.Module):
    """An exponential moving average of a model: ``timm.utils.ModelEmaV3``, on the launches of this package.

    A drop-in: the arguments, methods and numbers of timm's class, with one launch for all parameters and floating-point
    buffers. Integer buffers (and complex ones) are copied. Two things differ, both on purpose: a tensor that occurs
    twice in the model (tied weights) is averaged once a step, not twice, and a model that does not match is an error.

    FSDP2 refuses to copy a model that it has sharded: make the EMA first. It is then whole on every rank, and every
    update gathers the model. Sharded like the model, by ``fully_shard(ema.module)``, it needs nothing from other ranks.

    Args:
        model: what is averaged; :attr:`module` starts as a copy of it, in eval mode.
        decay: the EMA's momentum, in [0, 1].
        min_decay: the smallest momentum during warm-up.
        update_after_step: up to this step the EMA is the model itself.
        use_warmup: raise the momentum as ``1 - (1 + step / warmup_gamma) ** -warmup_power``.
        warmup_gamma, warmup_power: of this formula.
        device: where the EMA is kept; with the model if None. The CPU saves GPU memory and costs a transfer a step.
        dtype: of the EMA; the model's if None. float32 for a model in half precision, for instance.
        stochastic_rounding: whether bfloat16 EMAs are rounded stochastically. They stop moving otherwise.
        stochastic_rounding_seed: of the private random numbers for it, which are the same on every rank.
        foreach: accepted as timm does, and without effect: there is one launch either way.
        exclude_buffers: copy every buffer, the floating-point ones too.
        rounding: overrules ``stochastic_rounding``, for float16 as well as bfloat16: ``"nearest"`` or ``"stochastic"``.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__()
        _checks.check_fraction("decay", decay)
        _checks.check_fraction("min_decay", min_decay)
        if rounding is not None:
            _checks.check_rounding(rounding)
        self.module = copy.deepcopy(model)
        self.module.eval()
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.foreach = foreach
        self.exclude_buffers = exclude_buffers
        self.rounding = rounding
        if device is not None:
            self.module.to(device=device)
        if dtype is not None:
            self.module.to(dtype=dtype)
        self._generators: dict[torch.device, torch.Generator] = {}
        # Of generators that are still to be made: where a pickle is opened, their device may not be there.
        self._generator_states: dict[torch.device, Tensor] = {}
        self._forget()

    # --- the schedule and the updates, as timm has them

    def get_decay(self, step: int | None = None) -> float:
        """The momentum at a step: 0 up to ``update_after_step``, then the warm-up's, then ``decay``."""
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        warming = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(warming, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move the EMA one step towards ``model``; call after the optimizer's step.

        Raises:
            ValueError: the parameters or buffers of ``model`` are not those of the EMA in number or shape; a momentum
                outside [0, 1].
        """
        decay = self.get_decay(step)
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Average everything of floating point in the state_dict, copy the rest."""
        self._launches(model, average_buffers=True).run(decay)

    @torch.no_grad()
    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Average the parameters, copy the buffers."""
        self._launches(model, average_buffers=False).run(decay)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the EMA what ``model`` is."""
        for _, e, p in self._pairs(self.module.state_dict(), model.state_dict()):
            e.copy_(p)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model."""
        return self.module(*args, **kwargs)

    # --- which tensors belong together

    def _pair_states(self, model: nn.Module) -> tuple[list[Pair], list[Pair]]:
        pairs = self._pairs(self.module.state_dict(keep_vars=True), model.state_dict(keep_vars=True))
        averaged = [pair for pair in pairs if pair[1].is_floating_point()]
        return averaged, [pair for pair in pairs if not pair[1].is_floating_point()]

    def _pair_parameters(self, model: nn.Module) -> tuple[list[Pair], list[Pair]]:
        pairs = self._pairs(dict(self.module.named_parameters()), dict(model.named_parameters()))
        averaged = [(name, _real(e), _real(p)) for name, e, p in pairs]
        return averaged, self._pairs(dict(self.module.named_buffers()), dict(model.named_buffers()))

    @staticmethod
    def _pairs(ema: dict[str, Any], current: dict[str, Any]) -> list[Pair]:
        """Pairs by order, as the names of a wrapped model (DDP, compiled) differ; a shared tensor only once."""
        if len(ema) != len(current):
            raise ValueError(f"the model has {len(current)} parameters and buffers, its EMA {len(ema)}")
        pairs: dict[int, Pair] = {}
        for (name, e), p in zip(ema.items(), current.values(), strict=True):
            if not isinstance(e, Tensor) or not isinstance(p, Tensor):
                continue  # a module's extra state
            if e.shape != p.shape:
                raise ValueError(f"{name} has the shape {tuple(p.shape)} in the model, {tuple(e.shape)} in its EMA")
            if id(e) not in pairs:
                pairs[id(e)] = (name, *_local_pair(e, p))
        return list(pairs.values())

    # --- launches are prepared at the first update, and again when the modules hold other tensors

    def _forget(self) -> None:
        self._prepared: dict[bool, tuple[list[Any], _Launches]] = {}
        self._model: weakref.ref[nn.Module] | None = None

    def _launches(self, model: nn.Module, *, average_buffers: bool) -> _Launches:
        # Assigned parameters and buffers are new tensors, and what moves to another dtype or device within its
        # parameter (.data, module.to) has a new address: a walk over the modules finds both, at a third of the price of
        # a state_dict.
        tensors = _parts(model, _parts(self.module, []))
        parts = [*map(id, tensors)]
        known = parts + _addresses(tensors)
        if self._model is None or self._model() is not model:
            self._forget()
            self._model = weakref.ref(model, _forgetting(self))
        found = self._prepared.get(average_buffers)
        if found is not None and found[0] == known:
            return found[1]
        averaged, copied = self._pair_states(model) if average_buffers else self._pair_parameters(model)
        launches = _Launches(averaged, copied, self._rounding, self._generator)
        # state_dict hooks may hand out tensors made for the occasion, and a shard can be replaced within its DTensor:
        # then the next step has to look again.
        own = set(parts)
        if all(id(t) in own for _, *both in averaged + copied for t in both):
            self._prepared[average_buffers] = known, launches
        return launches

    def _rounding(self, dtype: torch.dtype) -> Rounding:
        if self.rounding is not None:
            return self.rounding
        return "stochastic" if self.stochastic_rounding and dtype == torch.bfloat16 else "nearest"

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device).manual_seed(self.stochastic_rounding_seed)
            if device in self._generator_states:
                generator.set_state(self._generator_states.pop(device))
            self._generators[device] = generator
        return self._generators[device]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles: launches are addresses of this instance's tensors, and are prepared anew. The state of the
        # random numbers goes along, generators themselves cannot where they belong to a GPU.
        state = self.__dict__.copy()
        state["_prepared"], state["_model"] = {}, None
        state["_generators"] = {}
        states = {d: g.get_state() for d, g in self._generators.items()}
        state["_generator_states"] = {**self._generator_states, **states}
        return state
