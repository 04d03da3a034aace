"""The Triton kernels on the CPU: the tests under triton_kernels/, in a process where Triton interprets.

Triton decides when it is imported whether it interprets or compiles, so that one process cannot do both. On a machine
with a GPU the same files also run compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = sorted((HERE / "triton_kernels").glob("*.py"))


def run(*files: Path, **environment: str) -> None:
    """Run pytest on the files in a fresh process; on failure, fail with what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider", *map(str, files)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "MANPP_", "PYTEST_"))}
    done = subprocess.run(
        command,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


def test_interpreted() -> None:
    """All in one process: in one each, imports and the first use of PyTorch would take as long as the tests."""
    run(*FILES, TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_compiled(file: Path) -> None:
    run(file)
