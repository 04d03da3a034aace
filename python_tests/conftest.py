"""What the tests share: the backends that can run here, and the devices they run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import manpp_kernels


@dataclass(frozen=True)
class Target:
    """A backend and a device it runs on."""

    backend: str
    device: str


def _targets() -> list[Target]:
    """Every backend on every device it serves here; Triton only on a GPU (its interpreter has tests of its own).

    MANPP_TEST_BACKENDS names the backends that have to be tested, as a comma-separated list: then one that cannot run
    fails the tests, where otherwise it would be left out of them.
    """
    asked = os.environ.get("MANPP_TEST_BACKENDS")
    backends = asked.split(",") if asked else manpp_kernels.available()
    targets = []
    for backend in backends:
        if backend in ("cpu", "eager"):
            targets.append(Target(backend, "cpu"))
        if backend in ("cuda", "triton", "eager") and torch.cuda.is_available():
            targets.append(Target(backend, "cuda"))
    return targets


TARGETS = [
    pytest.param(t, id=f"{t.backend}-{t.device}", marks=[pytest.mark.cuda] if t.device == "cuda" else [])
    for t in _targets()
]


BACKENDS_ON_CPU = [b for b in manpp_kernels.available() if b in ("cpu", "eager")]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many operations on small tensors, where threads that wait for each other on a busy machine take most time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as empty files, for tests of other things: to render one takes longer than to train on a few images."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Run the test once for each backend and device, with the backend in force."""
    with manpp_kernels.use_backend(request.param.backend):
        yield request.param


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is, with the backend that is picked for it."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
