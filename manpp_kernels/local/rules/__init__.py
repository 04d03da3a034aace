"""The rules of local learning, a file each.

A rule says what auxiliary network, with what loss, is put behind each local block. A new rule is a new file here with a
subclass of :class:`Rule` under ``@register("its name")``; no other file has to change.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Size, nn

from manpp_kernels.local.auxiliary import Auxiliary, Site, Transformed, Units
from manpp_kernels.local.block import LocalBlock
from manpp_kernels.local.options import check_choices
from manpp_kernels.local.targets import Criterion


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A rule that has nothing to set."""


class Rule:
    """Base of the rules; an instance holds its options.

    Attributes:
        Options: the class's dataclass of options, whose defaults are the published ones; there are none by default.
        name: under which it is registered.
        momentum: of the EMA updates, for rules that have EMA units.
        host_defaults: options in place of ``Options``' defaults where the rule hosts MAN or MAN++; None where it
            cannot be a host.
        overlapping: the losses of several blocks train one block, so that its gradients are complete only at the end
            of a step.
        any_outputs: whether its auxiliary networks can train a model that gives others than logits of images.
    """

    Options: ClassVar[type[Any]] = NoOptions
    name: ClassVar[str]
    host_defaults: ClassVar[Mapping[str, Any] | None] = None
    overlapping: ClassVar[bool] = False
    any_outputs: bool = False
    momentum: float = 0.0

    def __init__(self, options: Any) -> None:
        self.options = options

    def default_blocks(self, segments: int) -> int:
        """K where the user gives none: every segment (the stem and each unit) a block of its own."""
        return segments

    def check(self, segments: int, blocks: int) -> None:
        """Raise ValueError where this rule cannot train ``blocks`` local blocks of a model of ``segments``."""

    def check_order(self, order: str) -> None:
        """Raise ValueError where this rule cannot train in ``order``."""
        if self.overlapping and order != "published":
            raise ValueError(
                f"the blocks of the rule {self.name!r} overlap, so their gradients are complete only at the end of a "
                f"step, and order is {order!r}; use order='published'"
            )

    def check_apart(self, streams: int, pipeline: bool) -> None:
        """Raise ValueError where this rule's blocks cannot run at once, over streams or in a pipeline."""
        if self.overlapping and (streams > 1 or pipeline):
            raise ValueError(
                f"the losses of several blocks train one block by the rule {self.name!r}, so that its blocks cannot "
                f"run at once; set {'pipeline=False' if pipeline else 'streams=1'}"
            )

    def auxiliary(self, site: Site) -> Auxiliary:
        """The auxiliary network of one block; the caller moves it to the model's device and dtype.

        Called for every block but the last, in order; the last trains on the network's own head.
        """
        raise NotImplementedError

    def block(
        self, body: nn.Module, auxiliary: Auxiliary | None, criterion: Criterion, before: Sequence[LocalBlock]
    ) -> LocalBlock:
        """A local block, given those ``before`` it; for rules whose blocks hand on more than their features."""
        return LocalBlock(body, auxiliary, criterion)


_rules: dict[str, type[Rule]] = {}
R = TypeVar("R", bound=type[Rule])


def register(name: str) -> Callable[[R], R]:
    """Class decorator: make a rule known under ``name``."""

    def add(cls: R) -> R:
        cls.name = name
        _rules[name] = cls
        return cls

    return add


@dataclasses.dataclass(frozen=True)
class HostedOptions:
    """Options of a rule that has a host.

    Attributes:
        host: the rule whose auxiliary network classifies y.
        host_options: the host's options, a mapping or its dataclass; None for those it has as a host (``"dgl"``: the
            wide head).
        units: which units stand in front of the host's head: ``"next"``, the first of the next block, as published; or
            ``"stages"``, one behind the other, the first unit of every later stage of the network (those that change
            the shape of the features), and in the last stage the next unit.
    """

    host: str = "dgl"
    host_options: Any = None
    units: Units = "next"

    def __post_init__(self) -> None:
        check_choices(self)
        if isinstance(self.host_options, Mapping):
            object.__setattr__(self, "host_options", dict(self.host_options))


class Hosted(Rule):
    """Base of the rules that put later units, or copies of them, in front of the auxiliary network of a host rule."""

    def __init__(self, options: HostedOptions) -> None:
        super().__init__(options)
        self.host = make_rule(options.host, options.host_options, hosting=True)
        self.any_outputs = self.host.any_outputs

    def check(self, segments: int, blocks: int) -> None:
        check_units(self.name, segments)

    def hosted(self, site: Site, transforms: Sequence[nn.Module], features: Size) -> Auxiliary:
        """``transforms``, one behind the other, in front of the host's auxiliary network for their ``features``."""
        found = self.host.auxiliary(dataclasses.replace(site, features=features))
        for transform in reversed(transforms):
            found = Transformed(transform, found)
        return found


def check_units(rule: str, segments: int) -> None:
    """Raise ValueError where a model of ``segments`` has no unit that an auxiliary network could look ahead to."""
    if segments < 2:
        raise ValueError(
            f"the rule {rule!r} looks at a unit further down, and the model has no units behind its stem; use a "
            "model with more units, or rule='e2e'"
        )


def names() -> list[str]:
    """The rules there are."""
    return sorted(_rules)


def make_rule(name: str, options: Any = None, *, hosting: bool = False) -> Rule:
    """The rule ``name`` with its options.

    Args:
        name: one of :func:`names`.
        options: an instance of the rule's ``Options``, or a mapping of some of its fields, or None for the defaults.
        hosting: the rule is to host MAN or MAN++.

    Raises:
        ValueError: an unknown rule, one that cannot host, or an option the rule does not have.
        TypeError: ``options`` is neither a mapping nor of the rule's own class.
    """
    cls = _rules.get(name)
    if cls is None:
        raise ValueError(f"there is no rule {name!r}; there are {', '.join(names())}")
    if hosting and cls.host_defaults is None:
        hosts = [n for n in names() if _rules[n].host_defaults is not None]
        raise ValueError(f"the rule {name!r} cannot be a host; choose from {', '.join(hosts)}")
    if options is None or isinstance(options, Mapping):
        fields = {f.name for f in dataclasses.fields(cls.Options)}
        unknown = sorted(set(options or ()) - fields)
        if unknown:
            there_are = f"it has {', '.join(sorted(fields))}" if fields else "it has none"
            raise ValueError(f"the rule {name!r} has no option {unknown[0]!r}; {there_are}")
        options = cls.Options(**{**((cls.host_defaults or {}) if hosting else {}), **(options or {})})
    if not isinstance(options, cls.Options):
        raise TypeError(
            f"the options of the rule {name!r} have to be a mapping or {cls.Options.__name__}, and are "
            f"{type(options).__name__}"
        )
    return cls(options)


def with_normalization(
    name: str, options: Mapping[str, Any] | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> Mapping[str, Any] | None:
    """The options of the rule ``name``, told what images are normalised with, if it or its host asks.

    A rule asks by options ``mean`` and ``std``; where they are given, they stay. Data loaders know the values, and
    the rule's options are where they are needed.
    """
    given = dict(options or {})
    fields = {f.name for f in dataclasses.fields(make_rule(name, given).Options)}
    if {"mean", "std"} <= fields:
        return {"mean": mean, "std": std, **given}
    if {"host", "host_options"} <= fields:
        hosted = with_normalization(make_rule(name, given).options.host, given.get("host_options"), mean, std)
        return {**given, "host_options": hosted} if hosted else options
    return options


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
