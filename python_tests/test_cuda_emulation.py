"""The CUDA kernels, run without a GPU: compiled for the host under sanitizers, and put to the operators' own tests.

A build by CMake (cmake/emulation.cmake) gives a library that serves CPU tensors with the kernels of csrc/cuda. Its
threads run in an order drawn anew for every launch, from MANPP_EMULATION_SEED. It is used in processes of their own,
which start with the address sanitizer loaded, so that an access past the end of a tensor ends them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("cmake") is None or sys.platform != "linux",
    reason="emulating the CUDA kernels needs g++ and cmake, on Linux",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Builds the library; returns the environment of a process that uses it."""
    build = tmp_path_factory.mktemp("emulated")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DMANPP_CUDA=off", "-DMANPP_EMULATION=on", f"-DMANPP_OUTPUT_DIR={build}", "-DCMAKE_CXX_COMPILER=g++"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    for command in (configure, ["cmake", "--build", str(build), "--target", "emulated", "--parallel"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-6000:]
        assert "warning:" not in done.stdout, done.stdout[-6000:]
    sanitizers = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(sanitizers),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MANPP_EMULATED": str(build / "_C_emulated.abi3.so"),
        "MANPP_BACKEND": "",
        "MANPP_TEST_BACKENDS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE / "cuda_emulation"), str(HERE), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    # -s: what a sanitizer says before it ends the process would be lost with what pytest had captured.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "emulated_library",
        "-p",
        "no:cacheprovider",
        "-x",
        "-s",
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def passed(process: subprocess.Popen[str]) -> None:
    output = process.communicate()[0]
    print(output.splitlines()[-1] if output else "")
    assert process.returncode == 0, output[-8000:]


def test_kernels(environment: dict[str, str]) -> None:
    # Side by side. Left out: what tests the formulas of autograd and the checks of arguments, no kernel; and results
    # larger than the caches, which only the CPU's kernels write otherwise. Here they are more blocks of the same.
    kernels = start(environment, str(HERE / "cuda_emulation" / "kernels.py"))
    names = ("ema_scale_update", "ema_scale_update_gradients", "detach_copy", "stochastic_rounding", "plan")
    files = [str(HERE / f"test_{n}.py") for n in (*names, "scale_bias_mix")]
    operators = start(environment, *files, "-k", "not gradcheck and not misuse and not the_caches")
    passed(kernels)
    passed(operators)


def test_an_access_out_of_bounds_is_found(environment: dict[str, str]) -> None:
    crash = f"{HERE / 'cuda_emulation' / 'kernels.py'}::test_it_finds_an_access_out_of_bounds"
    process = start({**environment, "MANPP_EMULATION_CRASH": "1"}, crash)
    output = process.communicate()[0]
    assert process.returncode != 0
    assert "heap-buffer-overflow" in output, output[-4000:]
    assert "chunks.cuh" in output or "ema_scale_update.cu" in output or "common.cuh" in output, output[-4000:]
