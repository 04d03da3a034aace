"""manpp_kernels.local.options: what is a choice, and what a number, of settings that come from anywhere."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from manpp_kernels.local.options import (
    check_choices,
    check_count,
    check_finite,
    check_fraction,
    check_positive,
    check_weight,
)
from manpp_kernels.local.rules.dgl import DglOptions
from manpp_kernels.trainer import TrainerConfig

if TYPE_CHECKING:
    from somewhere import Schedule  # type: ignore[import-not-found]

CHECKS = {
    **{"count": check_count, "fraction": check_fraction, "weight": check_weight},
    **{"positive": check_positive, "finite": check_finite},
}


class Order(str, enum.Enum):
    UNLOCKED = "unlocked"


def test_a_choice_may_be_a_text_of_a_kind_of_its_own() -> None:
    for order in (np.str_("unlocked"), Order.UNLOCKED):
        assert TrainerConfig(order=order).order == "unlocked"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="order has to be one of published, unlocked, and is 1"):
        TrainerConfig(order=1)  # type: ignore[arg-type]


def test_types_that_only_a_type_checker_sees() -> None:
    """The choices that are known otherwise are checked all the same."""
    Hidden = Literal["a", "b"]

    @dataclasses.dataclass(frozen=True)
    class Scheduled(DglOptions):
        moves: Schedule | None = None

    @dataclasses.dataclass(frozen=True)
    class Local(DglOptions):
        hidden: Hidden = "a"

    for kind in (Scheduled, Local):
        kind(width="wide")
        with pytest.raises(ValueError, match="width has to be one of narrow, wide, linear, and is 'huge'"):
            kind(width="huge")  # type: ignore[arg-type]

    @dataclasses.dataclass
    class Alone:
        moves: Schedule

    check_choices(Alone(1))


def test_numbers_without_end() -> None:
    for check in (check_positive, check_weight):
        check("n", 1)
        with pytest.raises(ValueError, match="n has to be finite, and is inf"):
            check("n", math.inf)
        for value in (-1.0, -math.inf, math.nan):
            with pytest.raises(ValueError, match=f"n has to be (positive|0 or more), and is {value}"):
                check("n", value)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ("count", [1, 7, np.int64(3)], [0, -1]),
        ("fraction", [0, 0.0, 0.5, 1, 1.0, np.float32(0.5)], [-1e-9, 1.0000001, math.nan, math.inf]),
        ("weight", [0, 0.0, 7.5, np.float32(2)], [-1e-9, math.nan, math.inf, -math.inf]),
        ("positive", [1e-9, 3], [0, 0.0, -1.0, math.nan, math.inf]),
        ("finite", [-1e9, 0, 3.5, np.float32(2)], [math.nan, math.inf, -math.inf]),
    ],
)
def test_numbers(check: str, right: list[Any], wrong: list[Any]) -> None:
    for value in right:
        CHECKS[check]("name", value)
    for value in wrong:
        with pytest.raises(ValueError, match="name has to "):
            CHECKS[check]("name", value)
    for value in (True, "1", None, [1], *([1.0] if check == "count" else [])):
        with pytest.raises(TypeError, match=r"name has to be a (whole )?number, and is "):
            CHECKS[check]("name", value)


@dataclasses.dataclass
class Chosen:
    size: Literal[0, 1, 2] = 1
    kind: Literal["a", "b"] | None = None
    other: int | str = 0
    flag: bool = False
    perhaps: bool | None = None


def test_choices() -> None:
    for right in (Chosen(), Chosen(0, "b", "whatever"), Chosen(2, "a", -9), Chosen(flag=True)):
        check_choices(right)
    for wrong, message in (
        (Chosen(3), "size has to be one of 0, 1, 2, and is 3"),  # type: ignore[arg-type]
        (Chosen(kind="c"), "kind has to be one of None, a, b, and is 'c'"),  # type: ignore[arg-type]
        (Chosen(kind=0), "kind has to be one of None, a, b, and is 0"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            check_choices(wrong)
    for flag in ("no", "", 1, 0, None, np.True_):
        with pytest.raises(TypeError, match=f"flag has to be True or False, and is {flag!r}"):
            check_choices(Chosen(flag=flag))  # type: ignore[arg-type]
