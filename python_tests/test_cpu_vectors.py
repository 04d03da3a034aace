"""The CPU kernels are compiled for several instruction sets: each gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manpp_kernels import backends


def _results(capability: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cpu_digests.py"))],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


@pytest.mark.skipif(not backends.CPU_COMPILED, reason="the CPU kernels are not built")
def test_every_instruction_set_gives_the_same_bits() -> None:
    expected = _results("default")
    assert len(expected) == 16 + 8 + 8 + 24 + 2
    for capability in ("avx2", "avx512"):  # where the processor has it
        assert _results(capability) == expected
