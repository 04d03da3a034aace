"""``manpp doctor``: what it says, and the exit code that a script reads."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import manpp_kernels
from manpp_kernels import backends
from manpp_kernels.cli import doctor, main


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: Any) -> None:
    monkeypatch.delenv("MANPP_BACKEND", raising=False)


def test_every_backend_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in report
    assert f"{'manpp-kernels':<22}{manpp_kernels.__version__}" in report
    assert "compiled kernels" in report
    for backend in backends.BACKENDS:
        said = re.search(rf"^{backend} +(.+)$", report.partition("\n\n")[2], re.MULTILINE)
        assert said is not None, backend
        reason = manpp_kernels.why_not(backend)
        assert said[1] == (f"not available: {reason}" if reason else "ok")


@pytest.mark.parametrize(
    "what",
    [
        *("ema_scale_update", "ema_scale_update backward", "scale_bias_mix", "scale_bias_mix backward"),
        "detach_copy",
    ],
)
def test_a_backend_that_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: Any, what: str) -> None:
    operator, _, backward = what.partition(" ")
    right = getattr(manpp_kernels, operator)

    def wrong(first: Any, *args: Any, **options: Any) -> Any:
        found = right(first, *args, **options)
        results = found if isinstance(found, list) else [found]
        if backends.selected((first[0] if isinstance(first, list) else first).device) == "eager":
            return found
        if backward:
            for y in results:
                y.register_hook(lambda gradient: 1.01 * gradient)
            return found
        return [y + 1e-2 for y in results] if isinstance(found, list) else found + 1e-2

    others = [b for b in manpp_kernels.available() if b != "eager"]
    if not others:
        pytest.skip("there is nothing to compare with plain PyTorch")
    monkeypatch.setattr(doctor, operator, wrong)
    assert main(["doctor"]) == 1
    assert re.search(rf"WRONG: {what} differs by up to \d", capsys.readouterr().out)


def test_the_backend_that_the_environment_asks_for(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("MANPP_BACKEND", "eager")
    assert main(["doctor"]) == 0
    assert "MANPP_BACKEND asks for eager\n" in capsys.readouterr().out
    monkeypatch.setenv("MANPP_BACKEND", "egaer")
    assert main(["doctor"]) == 1
    assert "asks for egaer, which cannot run: there is no backend 'egaer'" in capsys.readouterr().out
