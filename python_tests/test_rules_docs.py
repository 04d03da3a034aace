"""The page about the rules: every rule has a section, with its options and their defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from manpp_kernels.local import make_rule, rule_names
from manpp_kernels.recipes import RECIPES

PAGE = (Path(__file__).parent.parent / "docs" / "rules.md").read_text(encoding="utf-8")


def section(rule: str) -> str:
    return re.split(rf"^## {re.escape(rule)}$", PAGE, flags=re.MULTILINE)[1].partition("\n## ")[0]


@pytest.mark.parametrize("rule", rule_names())
def test_every_option_stands_there_with_its_default(rule: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section(rule), flags=re.MULTILINE))
    options = {f.name: f.default for f in dataclasses.fields(make_rule(rule).Options)}
    if rule == "man++":
        inherited = {f.name for f in dataclasses.fields(make_rule("man").Options)}
        options = {name: value for name, value in options.items() if name not in inherited}
    assert {name: text.strip("`") for name, text in rows.items()} == {
        name: "none" if value is None else str(value) for name, value in options.items()
    }


def test_the_recipes_it_names_exist() -> None:
    names = re.findall(r"--recipe (\S+)", PAGE)
    assert names
    assert set(names) <= set(RECIPES)
    (rules,) = re.findall(r"^- rules: (.*?); the suffix", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\S+?)`", rules)) == {recipe.partition("/")[0] for recipe in RECIPES}
