"""Every way to move an EMA, and to compute the effective weights with it, that a user would compare ours with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import COMPILE, DEVICE
from tensors import Shapes
from timing import Call, Contender
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import manpp_kernels
from manpp_kernels import EmaPlan

MOMENTUM = 0.995
TOTAL = 2.0
# Graphs of more kernels than this take longer to capture than they tell.
MOST_CAPTURED = 4000


@dataclass
class Inputs:
    """One input set.

    Attributes:
        scale: one entry a group; ``scales`` holds the same as Python numbers, one a tensor, which peers are given
            without having to wait for the device.
    """

    ema: list[Tensor]
    params: list[Tensor]
    bias: list[Tensor]
    scale: Tensor
    groups: list[int]
    scales: list[float]


@dataclass(frozen=True)
class Kind:
    """What is averaged into what: the dtypes of a row, and which parts of the operator it runs."""

    name: str
    ema: torch.dtype = torch.float32
    params: torch.dtype = torch.float32
    weights: bool = False
    rounding: str = "nearest"

    def bytes_per_element(self) -> int:
        moved = 2 * self.ema.itemsize + self.params.itemsize
        return moved + 2 * self.params.itemsize if self.weights else moved

    def footprint_per_element(self) -> int:
        return self.ema.itemsize + self.params.itemsize * (3 if self.weights else 1)

    @property
    def mixed(self) -> bool:
        return self.ema != self.params


def make_inputs(shapes: Shapes, kind: Kind, groups: int) -> Inputs:
    """Random tensors, and for the effective weights a scale for each of ``groups`` runs of tensors."""

    def draw(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]

    scale = torch.rand(groups) + 0.5
    index = [i * groups // len(shapes) for i in range(len(shapes))]
    return Inputs(
        draw(kind.ema),
        draw(kind.params),
        draw(kind.params) if kind.weights else [],
        scale.to(DEVICE) if groups > 1 else scale[0].to(DEVICE),
        index if groups > 1 else [],
        [float(scale[g]) for g in index],
    )


# Ours


def our_backends() -> list[str]:
    return [b for b in manpp_kernels.available() if b != "eager" and (b == "cpu") == (DEVICE.type == "cpu")]


def headline() -> str:
    """The contender a row is about: a plan on the fastest backend."""
    return f"{our_backends()[0]} plan"


def ours(sets: list[Inputs], kind: Kind) -> list[Contender]:
    found = []
    for backend in our_backends():
        with manpp_kernels.use_backend(backend):
            plans = [_plan_call(x, kind) for x in sets]
        found.append(Contender(f"{backend} plan", plans, ours=True, backend=backend))
        found.append(Contender(f"{backend} op", [_op_call(x, kind) for x in sets], ours=True, backend=backend))
    if len(sets[0].ema) <= 100:  # no competitor, and slow on larger lists
        found.append(
            Contender("eager op", [_op_call(x, kind) for x in sets], ours=True, backend="eager", capture=False)
        )
    return found


def _plan_call(x: Inputs, kind: Kind) -> Call:
    rounding = "stochastic" if kind.rounding == "stochastic" else "nearest"
    if not kind.weights:
        plan = EmaPlan(x.ema, x.params, rounding=rounding)
        return lambda: plan.update(MOMENTUM)
    plan = EmaPlan(x.ema, x.params, bias=x.bias, groups=x.groups or None, total=TOTAL, rounding=rounding)
    return lambda: plan.update(MOMENTUM, scale=x.scale)


def _op_call(x: Inputs, kind: Kind) -> Call:
    rounding = "stochastic" if kind.rounding == "stochastic" else "nearest"
    if not kind.weights:
        return lambda: manpp_kernels.ema_scale_update(x.ema, x.params, MOMENTUM, rounding=rounding)
    return lambda: manpp_kernels.ema_scale_update(
        x.ema,
        x.params,
        MOMENTUM,
        scale=x.scale,
        bias=x.bias,
        groups=x.groups or None,
        total=TOTAL,
        rounding=rounding,
    )


# Peers that only update


def authors_loop(ema: list[Tensor], params: list[Tensor]) -> None:
    """As the release of MAN++ has it: a new tensor for each parameter."""
    for e, p in zip(ema, params, strict=True):
        e.data = e.data * MOMENTUM + p.data * (1 - MOMENTUM)


def loop(ema: list[Tensor], params: list[Tensor]) -> None:
    for e, p in zip(ema, params, strict=True):
        e.mul_(MOMENTUM).add_(p, alpha=1 - MOMENTUM)


def foreach_lerp(ema: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_lerp_(ema, params, 1 - MOMENTUM)


def foreach_mul_add(ema: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_mul_(ema, MOMENTUM)
    torch._foreach_add_(ema, params, alpha=1 - MOMENTUM)


class Model(nn.Module):
    """A module whose parameters are the given tensors, for the drop-ins that take modules."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)

    def hold(self, tensors: list[Tensor]) -> None:
        for parameter, t in zip(self.tensors, tensors, strict=True):
            parameter.data = t


def _averaged_model(x: Inputs, function: Callable[..., None]) -> Call:
    model = Model(x.params)
    averaged = AveragedModel(model, multi_avg_fn=function)
    averaged.module.hold(x.ema)  # no copy of its own: all contenders share an input set
    averaged.n_averaged.fill_(1)
    return lambda: averaged.update_parameters(model)


def _model_ema(x: Inputs, cls: type, **options: object) -> Call:
    model = Model(x.params)
    average = cls(model, decay=MOMENTUM, **options)
    average.module.hold(x.ema)
    return lambda: average.update(model)


def _timm(sets: list[Inputs], kind: Kind) -> list[Contender]:
    try:
        from timm.utils import ModelEmaV3
    except ImportError:
        return []
    options: dict[str, object] = {}
    if kind.ema == torch.bfloat16:
        if "stochastic_rounding" not in inspect.signature(ModelEmaV3).parameters:
            return []  # an older one rounds to nearest only, and cannot mix dtypes
        options["stochastic_rounding"] = kind.rounding == "stochastic"
    return [Contender("timm ModelEmaV3", [_model_ema(x, ModelEmaV3, **options) for x in sets], capture=False)]


def _dropins(sets: list[Inputs]) -> list[Contender]:
    """Our drop-ins for the two above, which share their costs around the launch."""
    found = []
    average = getattr(manpp_kernels, "ema_multi_avg_fn", None)
    if average is not None:
        calls = [_averaged_model(x, average(MOMENTUM)) for x in sets]
        found.append(Contender("AveragedModel, ours", calls, ours=True, capture=False))
    model_ema = getattr(manpp_kernels, "ModelEma", None)
    if model_ema is not None:
        calls = [_model_ema(x, model_ema) for x in sets]
        found.append(Contender("ModelEma, ours", calls, ours=True, capture=False))
    return found


def _peer(name: str, function: Callable[..., object], sets: list[Inputs], kernels: int = 1) -> Contender:
    """``kernels``: how many launches a call makes on CUDA, roughly."""
    calls = [lambda x=x: function(x.ema, x.params) for x in sets]
    return Contender(name, calls, capture=kernels * len(sets) <= MOST_CAPTURED)


def update_peers(sets: list[Inputs], kind: Kind, compiled: bool) -> list[Contender]:
    count = len(sets[0].ema)
    # This one puts new memory under its tensors, which the plans of the same input set would have to follow.
    apart = [([e.detach() for e in x.ema], x.params) for x in sets]
    found = [
        Contender("loop, e = m e + (1 - m) p", [lambda x=x: authors_loop(*x) for x in apart], capture=False),
        _peer("loop, mul_ add_", loop, sets, 2 * count),
        _peer("foreach mul_ add_", foreach_mul_add, sets),
    ]
    if not kind.mixed:
        found.append(_peer("foreach lerp_", foreach_lerp, sets))
        found.append(
            Contender(
                "AveragedModel", [_averaged_model(x, get_ema_multi_avg_fn(MOMENTUM)) for x in sets], capture=False
            )
        )
        found += _dropins(sets)
    found += _timm(sets, kind)
    if compiled and COMPILE:
        found.append(_peer("compiled loop", torch.compile(loop), sets, count))
        found.append(_peer("compiled foreach", torch.compile(foreach_mul_add if kind.mixed else foreach_lerp), sets))
        if DEVICE.type == "cuda":
            tuned = torch.compile(loop, mode="max-autotune-no-cudagraphs")
            found.append(_peer("compiled loop, max-autotune", tuned, sets, count))
    return found


# Compositions that also give the effective weights w = s b + (T - s) e


@dataclass
class Composition:
    """Inputs of a peer, with a place for the weights where it wants one."""

    x: Inputs
    out: list[Tensor]

    @property
    def scale(self) -> float | None:
        """The scale, where all tensors have the same."""
        return None if self.x.groups else self.x.scales[0]


def mul_add(c: Composition) -> list[Tensor]:
    foreach_lerp(c.x.ema, c.x.params)
    if c.scale is not None:
        w = torch._foreach_mul(c.x.bias, c.scale)
        torch._foreach_add_(w, c.x.ema, alpha=TOTAL - c.scale)
        return list(w)
    w = torch._foreach_mul(c.x.bias, c.x.scales)
    torch._foreach_add_(w, torch._foreach_mul(c.x.ema, [TOTAL - s for s in c.x.scales]))
    return list(w)


def lerp_mul(c: Composition) -> list[Tensor]:
    """Coefficients that sum to one, then the total."""
    foreach_lerp(c.x.ema, c.x.params)
    share = [s / TOTAL for s in c.x.scales] if c.scale is None else c.scale / TOTAL
    w = torch._foreach_lerp(c.x.ema, c.x.bias, share)
    torch._foreach_mul_(w, TOTAL)
    return list(w)


def lerp_mul_out(c: Composition) -> list[Tensor]:
    foreach_lerp(c.x.ema, c.x.params)
    torch._foreach_copy_(c.out, c.x.ema)
    share = [s / TOTAL for s in c.x.scales] if c.scale is None else c.scale / TOTAL
    torch._foreach_lerp_(c.out, c.x.bias, share)
    torch._foreach_mul_(c.out, TOTAL)
    return c.out


def mul_add_out(c: Composition) -> list[Tensor]:
    """For one scale alone: foreach has no add with an alpha for each tensor."""
    foreach_lerp(c.x.ema, c.x.params)
    torch._foreach_copy_(c.out, c.x.ema)
    torch._foreach_mul_(c.out, TOTAL - c.x.scales[0])
    torch._foreach_add_(c.out, c.x.bias, alpha=c.x.scales[0])
    return c.out


def loop_out(c: Composition) -> list[Tensor]:
    """Tensor by tensor, so that on a CPU one is still in the cache when it is used again."""
    for e, p, b, w, s in zip(c.x.ema, c.x.params, c.x.bias, c.out, c.x.scales, strict=True):
        e.lerp_(p, 1 - MOMENTUM)
        torch.mul(b, s, out=w)
        w.add_(e, alpha=TOTAL - s)
    return c.out


def plain(ema: list[Tensor], params: list[Tensor], bias: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """As the formula says; what torch.compile is given. The scales are tensors, or every value would be a new graph."""
    weights = []
    for e, p, b, s in zip(ema, params, bias, scales, strict=True):
        e.mul_(MOMENTUM).add_(p, alpha=1 - MOMENTUM)
        weights.append(s * b + (TOTAL - s) * e)
    return weights


def weights_peers(sets: list[Inputs], kind: Kind, compiled: bool) -> list[Contender]:
    count = len(sets[0].ema)
    made = [Composition(x, [torch.randn_like(b) for b in x.bias]) for x in sets]
    found = []
    if not kind.mixed:
        ways = {"foreach lerp_, mul, add_": mul_add, "foreach lerp_, lerp, mul_": lerp_mul}
        ways |= {"foreach lerp_, copy_, lerp_, mul_": lerp_mul_out}
        if not sets[0].groups:
            ways |= {"foreach lerp_, copy_, mul_, add_": mul_add_out}
        found += [Contender(name, [lambda c=c, f=f: f(c) for c in made]) for name, f in ways.items()]
        loops = [lambda c=c: loop_out(c) for c in made]
        found.append(Contender("loop lerp_, mul, add_ (out=)", loops, capture=3 * count * len(sets) <= MOST_CAPTURED))
    scales = [list(x.scale.reshape(-1)[x.groups].unbind()) if x.groups else [x.scale] * count for x in sets]
    formula = [lambda x=x, s=s: plain(x.ema, x.params, x.bias, s) for x, s in zip(sets, scales, strict=True)]
    found.append(Contender("loop, the formula", formula, capture=5 * count * len(sets) <= MOST_CAPTURED))
    if compiled and COMPILE:
        modes = {"compiled formula": None}
        if DEVICE.type == "cuda":
            modes["compiled formula, max-autotune"] = "max-autotune-no-cudagraphs"
        for name, mode in modes.items():
            f = torch.compile(plain, mode=mode)
            calls = [lambda x=x, s=s, f=f: f(x.ema, x.params, x.bias, s) for x, s in zip(sets, scales, strict=True)]
            found.append(Contender(name, calls, capture=count * len(sets) <= MOST_CAPTURED))
    return found
