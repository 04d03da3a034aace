"""What a local block learns by: its auxiliary network, and the EMA units that MAN and MAN++ put into it.

The two published transforms (MAN: Su et al., ECCV 2024; MAN++: arXiv 2507.16279) and the parameter form of MAN++ stand
here as modules that turn a block's features x into y, which the head of a host rule then classifies. With u the first
unit of the next block, LB a trainable copy of it, phi the EMA of u's parameters and s a trainable scalar::

    MAN                      y = LB(x) + EMA(x)
    MAN++, activation form   y = s LB(x) + (T - s) EMA(x)
    MAN++, parameter form    y = u(x; w),  w = s beta + (T - s) phi          (beta: the parameters of LB)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from manpp_kernels.local.partition import Partition
from manpp_kernels.local.parts import has_parameters
from manpp_kernels.local.segments import Segment
from manpp_kernels.local.targets import BatchError, Criterion
from manpp_kernels.ops._checks import Rounding
from manpp_kernels.ops.ema_scale_update_backward import attach_effective_weights
from manpp_kernels.ops.scale_bias_mix import scale_bias_mix
from manpp_kernels.plan import EmaPlan

Units = Literal["next", "stages"]


@dataclass(frozen=True)
class Site:
    """The place an auxiliary network is built for: behind block ``index`` of a partitioned model.

    Attributes:
        partition: all of the model, so that a rule can look at units further down.
        index: j, the local block, counted from 0.
        features: the shape that the auxiliary network takes, the batch dimension included (its size means nothing).
        num_classes: of the classifier.
        criterion: loss of logits (N, num_classes) and targets, a mean over the batch.
    """

    partition: Partition
    index: int
    features: torch.Size
    num_classes: int
    criterion: Criterion

    @property
    def count(self) -> int:
        """K, the number of local blocks."""
        return len(self.partition)

    @property
    def later(self) -> tuple[Segment, ...]:
        """Every unit behind this block, in order."""
        return self.partition.segments[self.partition.blocks[self.index].stop :]

    @property
    def next_unit(self) -> Segment:
        """The first unit of the next block; raises ValueError as :meth:`ahead`."""
        return self.ahead("next")[0]

    def ahead(self, units: Units) -> tuple[Segment, ...]:
        """The units that stand for what follows this block, in order; each takes the features of the one before.

        Args:
            units: ``"next"``, the first unit of the next block; or ``"stages"``, the first unit of every later stage,
                which are those that change the shape of their features, and the next unit where there is none.

        Raises:
            ValueError: there is no next block, or a unit cannot be fed the same features as another.
        """
        if not self.later:
            raise ValueError(
                "this rule takes an EMA of the first unit of the next block, and there is no next block; use a model "
                "with more units, or rule='e2e'"
            )
        chosen = self.later[:1]
        if units == "stages":
            start = self.partition.blocks[self.index].stop - 1
            pairs = itertools.pairwise(self.partition.segments[start:])
            chosen = tuple(unit for before, unit in pairs if unit.shape != before.shape) or chosen
        for unit in chosen:
            _check_copied(unit)
        return chosen


def _check_copied(unit: Segment) -> None:
    if not has_parameters(unit.module):
        raise ValueError(f"{unit.name} has no parameters to average; set the boundary before a unit that has some")
    if unit.writes_input:
        raise ValueError(
            f"{unit.name} changes its input in place, so a copy of it cannot share that input; give its first "
            "layer inplace=False"
        )


class Auxiliary(nn.Module):
    """The auxiliary network of a local block together with its loss; what a rule builds for every block but the last.

    ``forward(features, images, targets)`` takes the block's output (attached to its graph), the network's input images
    and the targets, and returns the block's loss, a scalar.
    """

    def forward(self, features: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError


class Prepared:
    """A module of an auxiliary network that has work to do before it runs, in plain Python.

    ``torch.compile`` would take it in, or run what surrounds it uncompiled where it cannot.
    """

    def before_forward(self, images: Tensor) -> None:
        """Called before each forward pass of the auxiliary network with the network's input images."""
        raise NotImplementedError


class Classifier(Auxiliary):
    """A local head and the network's own criterion: the loss of DGL."""

    def __init__(self, head: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.head = head
        self.criterion = criterion

    def forward(self, features: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.head(features), targets)


class PixelClassifier(Classifier):
    """The same for every pixel: the head's logits, bilinearly as large as the targets (N, H, W), and the criterion."""

    def forward(self, features: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() < 3:
            raise BatchError(
                f"the model classifies pixels, and its targets have to be (N, H, W), and are {tuple(targets.shape)}"
            )
        logits = F.interpolate(self.head(features), targets.shape[-2:], mode="bilinear", align_corners=False)
        return self.criterion(logits, targets)


class Transformed(Auxiliary):
    """A transform of the features in front of the auxiliary network of a host rule."""

    def __init__(self, transform: nn.Module, host: Auxiliary) -> None:
        super().__init__()
        self.transform = transform
        self.host = host

    def forward(self, features: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        return self.host(self.transform(features), images, targets)


Init = Literal["copy", "fresh"]
INITS = get_args(Init)


def copy_unit(unit: nn.Module, init: Init, fresh: Callable[[nn.Module], None], *, trainable: bool) -> nn.Module:
    """A copy of ``unit`` for an auxiliary network.

    Its batch normalisations keep no running statistics: they normalise by the batch, and touch nothing of the user's.

    Args:
        unit: the user's module.
        init: ``"copy"`` keeps the values of the parameters, ``"fresh"`` draws them anew by ``fresh``.
        fresh: initialises a module in place.
        trainable: whether the copy's parameters require grad.

    Raises:
        ValueError: an unknown ``init``, or a weight that cannot be drawn anew.
    """
    if init not in INITS:
        raise ValueError(f"the initial values of a copied unit have to be one of {', '.join(INITS)}, not {init!r}")
    twin = copy.deepcopy(unit).train()
    if init == "fresh":
        _initialise(twin, fresh)
    for m in twin.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None
    for p in twin.parameters():
        p.grad = None
        p.requires_grad_(trainable)
    return twin


_HOOKS = (WeightNorm, SpectralNorm)


@torch.no_grad()
def _initialise(module: nn.Module, fresh: Callable[[nn.Module], None]) -> None:
    """Draw the parameters of ``module`` anew by ``fresh``, also weights that are computed from others."""
    if any(isinstance(hook, _HOOKS) for m in module.modules() for hook in m._forward_pre_hooks.values()):
        raise ValueError(
            "a weight computed by torch.nn.utils.weight_norm or spectral_norm cannot be drawn anew; use those of "
            "torch.nn.utils.parametrizations, or initial values that are a 'copy'"
        )
    computed = [(key, m) for key, m in module.named_modules() if parametrize.is_parametrized(m)]
    if not computed:
        fresh(module)
        return
    # On a copy that holds the weights themselves, from which each is set here by way of what it is computed from.
    plain = copy.deepcopy(module)
    for key, m in computed:
        _hold_weights(plain.get_submodule(key), list(m.parametrizations))
    fresh(plain)
    own = dict(module.named_parameters())
    for name, value in plain.named_parameters():
        if name in own:
            own[name].copy_(value)
    for key, m in computed:
        for name in m.parametrizations:
            try:
                setattr(m, name, getattr(plain.get_submodule(key), name).detach())
            except (NotImplementedError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{key}.{name} is computed in a way that cannot be set to a value ({error}); use initial values "
                    "that are a 'copy'"
                ) from error


def _hold_weights(module: nn.Module, names: list[str]) -> None:
    """Put weights in the place of their parametrizations.

    Not by ``remove_parametrizations``, which takes the property from a class that the module shares with its copies.
    """
    weights = [getattr(module, name).detach().clone() for name in names]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, weight in zip(names, weights, strict=True):
        module.register_parameter(name, nn.Parameter(weight))


class EmaTransform(nn.Module):
    """Base of the transforms: a trainable copy (``lb``) and an EMA copy (``ema``) of one unit of the next block.

    The EMA's parameters get no gradient of their own, and pass gradient on to their input. They move when an
    :class:`EmaUpdates` says so, never in ``forward``.
    """

    def __init__(self, unit: nn.Module, lb: nn.Module, ema: nn.Module) -> None:
        super().__init__()
        self.lb = lb
        self.ema = ema
        # In a list, so that the user's parameters are not registered as the transform's own.
        self._sources = list(unit.parameters())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each EMA tensor with the parameter it follows."""
        return list(zip(self.ema.parameters(), self._sources, strict=True))


class SumTransform(EmaTransform):
    """MAN: ``LB(x) + EMA(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lb(x) + self.ema(x)


def _initial_scale(unit: nn.Module, total: float) -> nn.Parameter:
    like = next(unit.parameters())
    return nn.Parameter(torch.tensor(total / 2, dtype=like.dtype, device=like.device))


class ActivationTransform(EmaTransform):
    """MAN++ as published: ``s LB(x) + (T - s) EMA(x)``, s starting at T / 2."""

    def __init__(self, unit: nn.Module, lb: nn.Module, ema: nn.Module, total: float) -> None:
        super().__init__(unit, lb, ema)
        self.total = total
        self.scale = _initial_scale(unit, total)

    def forward(self, x: Tensor) -> Tensor:
        return scale_bias_mix(self.lb(x), self.ema(x), self.scale, total=self.total)


class ParameterTransform(EmaTransform, Prepared):
    """MAN++ in the parameter form: one unit, run with the effective weights ``w = s beta + (T - s) phi``.

    ``values`` are those of w where an :class:`EmaUpdates` computed those of all blocks in one launch; where they are
    None, :meth:`before_forward` computes them. Either way they join the graph there, so that each block has a graph of
    its own, freed by its own backward pass.
    """

    def __init__(self, unit: nn.Module, lb: nn.Module, ema: nn.Module, total: float) -> None:
        super().__init__(unit, lb, ema)
        self.total = total
        self.scale = _initial_scale(unit, total)
        self.values: list[Tensor] | None = None
        self._weights: list[Tensor] | None = None
        self._names = [name for name, _ in self.lb.named_parameters()]
        self._plan: EmaPlan | None = None

    def beta(self) -> list[Tensor]:
        return list(self.lb.parameters())

    def effective_weights(self) -> list[Tensor]:
        """w for every parameter of the unit, differentiable in s and beta."""
        values = self.values
        if values is None:
            if self._plan is None:
                ema, params = zip(*self.pairs(), strict=True)
                self._plan = EmaPlan(ema, params, bias=self.beta(), total=self.total)
            # At momentum 1 the EMA stays as it is, which leaves the weights alone: one launch.
            with torch.no_grad():
                values = self._plan.update(1.0, scale=self.scale)
            assert values is not None
        phi = list(self.ema.parameters())
        return attach_effective_weights(values, self.scale, self.beta(), phi, [], self.total)

    def before_forward(self, images: Tensor) -> None:
        self._weights = self.effective_weights()

    def forward(self, x: Tensor) -> Tensor:
        weights, self._weights = self._weights, None
        if weights is None:
            weights = self.effective_weights()
        return torch.func.functional_call(self.lb, dict(zip(self._names, weights, strict=True)), (x,))


class EmaUpdates:
    """The EMA updates of some transforms, in one launch.

    EMAs in bfloat16 and float16 are rounded stochastically: to nearest, most of a step's movement would be lost.

    Args:
        transforms: whose EMAs move together.
        momentum: m of ``phi <- m phi + (1 - m) theta``.
        prepare: also compute the effective weights of the parameter form in the same launch, for the forward passes
            that follow.

    Attributes:
        rounded: the EMAs that are rounded at random, which comes out otherwise on every rank.
    """

    def __init__(self, transforms: list[EmaTransform], momentum: float, *, prepare: bool) -> None:
        self.momentum = momentum
        mixed = [t for t in transforms if isinstance(t, ParameterTransform)] if prepare else []
        plain = [t for t in transforms if t not in mixed]
        emas = [e for t in transforms for e, _ in t.pairs()]
        self.rounded = [e for e in emas if e.dtype in (torch.bfloat16, torch.float16)]
        rounding: Rounding = "stochastic" if self.rounded else "nearest"
        self._plain = EmaPlan(*_columns(plain), rounding=rounding) if plain else None
        self._mixed = mixed
        self._weights: EmaPlan | None = None
        if mixed:
            (total,) = {t.total for t in mixed}
            beta = [b for t in mixed for b in t.beta()]
            groups = [g for g, t in enumerate(mixed) for _ in t.beta()]
            self._weights = EmaPlan(*_columns(mixed), bias=beta, groups=groups, total=total, rounding=rounding)

    # The weights join the graph in each block's forward: a graph common to all blocks would have to outlive each block.
    @torch.no_grad()
    def update(self) -> None:
        """Move every EMA one step towards its source."""
        if self._plain is not None:
            self._plain.update(self.momentum)
        if self._weights is not None:
            weights = self._weights.update(self.momentum, scale=torch.stack([t.scale.detach() for t in self._mixed]))
            assert weights is not None
            values = iter(weights)
            for t in self._mixed:
                t.values = [next(values) for _ in t.beta()]


def _columns(transforms: list[EmaTransform] | list[ParameterTransform]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [pair for t in transforms for pair in t.pairs()]
    return [e for e, _ in pairs], [p for _, p in pairs]
