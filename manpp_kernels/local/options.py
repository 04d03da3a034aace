"""Checks of options and settings, which come from code, command lines and configuration files."""

from __future__ import annotations

import contextlib
import math
import typing
from numbers import Integral
from typing import Any, Literal

from manpp_kernels.ops._checks import check_fraction, check_number

__all__ = ["check_choices", "check_count", "check_finite", "check_fraction", "check_positive", "check_weight"]


def check_choices(options: Any) -> None:
    """Raise where a field of a dataclass has none of the values of its ``Literal``, or where a ``bool`` is none."""
    for name, hint in _hints(type(options)).items():
        allowed = _literal_values(hint)
        value = getattr(options, name)
        # Any text would count as true, "no" and "false" among them.
        if hint is bool and not isinstance(value, bool):
            raise TypeError(f"{name} has to be True or False, and is {value!r}")
        if allowed and not any(isinstance(value, type(a)) and value == a for a in allowed):
            raise ValueError(f"{name} has to be one of {', '.join(map(str, allowed))}, and is {value!r}")


def _hints(kind: type) -> dict[str, Any]:
    """The types of its fields, or of as near a base as they can be told of.

    Options of a rule from outside may name types that are imported for type checkers alone, or inside a function.
    """
    for base in kind.__mro__:
        with contextlib.suppress(NameError, AttributeError):
            return typing.get_type_hints(base)
    return {}


def _literal_values(hint: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``, or of ``Literal[...] | None``; none of any other type."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint)
    literals = [part for part in parts if typing.get_origin(part) is Literal]
    if len(literals) == 1 and set(parts) <= {literals[0], type(None)}:
        return (None, *typing.get_args(literals[0]))
    return ()


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise where it is no whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} has to be a whole number, and is {value!r}")
    if value < least:
        raise ValueError(f"{name} has to be {least} or more, and is {value}")


def check_weight(name: str, value: Any) -> None:
    """Raise where it is no finite number from 0 on."""
    check_number(name, value)
    if not value >= 0:  # nor NaN
        raise ValueError(f"{name} has to be 0 or more, and is {value}")
    check_finite(name, value)


def check_positive(name: str, value: Any) -> None:
    """Raise where it is no finite number above 0."""
    check_number(name, value)
    if not value > 0:  # nor NaN
        raise ValueError(f"{name} has to be positive, and is {value}")
    check_finite(name, value)


def check_finite(name: str, value: Any) -> None:
    """Raise where it is no finite number."""
    check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} has to be finite, and is {value}")
