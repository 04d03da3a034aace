"""What is built from this tree: the source distribution is whole, and no compiled code outlives its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ("csrc", "cmake")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a distribution is built from, without anything that was built."""
    copy = tmp_path / "tree"
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("manpp_kernels", *NATIVE):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def python(tree: Path, *words: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_source_distribution_has_all_that_is_compiled(tree: Path, tmp_path: Path) -> None:
    python(tree, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(p.relative_to(tree)) for name in (*NATIVE, "manpp_kernels") for p in (tree / name).rglob("*.*")}
    assert len(wanted) > 100
    assert {"CMakeLists.txt", "setup.py", "LICENSE", *wanted} <= found


def test_a_build_without_compiled_code_leaves_none_of_the_one_before(tree: Path) -> None:
    for name in ("_C.abi3.so", "_plan.cpython-311-x86_64-linux-gnu.so"):
        (tree / "manpp_kernels" / name).write_bytes(b"of older sources")
    output = python(tree, "setup.py", "build_ext", "--inplace", MANPP_NATIVE="off", MANPP_CUDA="off", CXX="")
    assert "building without compiled kernels: MANPP_NATIVE=off" in output
    assert not list((tree / "manpp_kernels").glob("*.so"))
