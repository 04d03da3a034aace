"""manpp_kernels.local.options: what is a choice, and what a number, of settings that come from anywhere."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest

from manpp_kernels.local.options import check_choices, check_positive, check_weight
from manpp_kernels.local.rules.dgl import DglOptions
from manpp_kernels.trainer import TrainerConfig

if TYPE_CHECKING:
    from somewhere import Schedule  # type: ignore[import-not-found]


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
