"""Builds the native modules by way of CMakeLists.txt, which is the one description of the native build.

MANPP_CUDA=auto|on|off says whether the CUDA kernels are built (auto: when nvcc is found); TORCH_CUDA_ARCH_LIST says for
which architectures. MANPP_NATIVE=off builds a package without compiled code, which runs on Triton and plain PyTorch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


def no_compiler() -> str:
    """Why nothing can be compiled here; empty where it can."""
    if os.environ.get("MANPP_NATIVE", "").lower() == "off":
        return "MANPP_NATIVE=off"
    compiler = (os.environ.get("CXX") or "c++").split()[:1]
    if not any(shutil.which(name) for name in (*compiler, "g++", "clang++")):
        return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    return ""


def first_error(output: str) -> str:
    """The text of CMake's first error, which CMakeLists.txt writes as a sentence that says what to do."""
    found = re.search(r"^CMake Error at .*:\n((?:  .*\n|[ ]*\n)+)", output, re.MULTILINE)
    return " ".join(found[1].split()) if found else "the first error above says why"


class CMakeBuild(build_ext):
    """Runs CMake once for all native modules, and puts them where setuptools expects the first."""

    def run(self) -> None:
        reason = no_compiler()
        if reason:
            if os.environ.get("MANPP_CUDA", "").lower() == "on":
                sys.exit(f"error: MANPP_CUDA=on, and the CUDA kernels cannot be built: {reason}")
            self.warn(f"building without compiled kernels: {reason}; Triton and plain PyTorch remain")
            self.extensions = []
            for path in map(Path, self.get_outputs()):  # of a build before, whose operators may be others by now
                path.unlink()
            return
        ninja = next(filter(None, map(shutil.which, ("ninja", "ninja-build", "samu"))), None)
        if not ninja or not shutil.which("cmake"):
            sys.exit(f"error: {'cmake' if ninja else 'ninja'} was not found: pip install cmake ninja")
        in_place = self.inplace or self.editable_mode
        target = (HERE if in_place else Path(self.build_lib)) / "manpp_kernels"
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(HERE),
            "-B",
            str(build),
            "-G",
            "Ninja",
            # Named, as the one of the build before may have been in an isolated environment that is gone.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMANPP_OUTPUT_DIR={target.resolve()}",
            f"-DMANPP_CUDA={os.environ.get('MANPP_CUDA', 'auto')}",
        ]
        configured = subprocess.run(configure, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(configured.stderr)
        if configured.returncode:
            sys.exit(f"error: the native build cannot be configured: {first_error(configured.stderr)}")
        if subprocess.run(["cmake", "--build", str(build)]).returncode:
            sys.exit("error: the native build failed; the first error above says why")

    def get_outputs(self) -> list[str]:
        built = (HERE if self.inplace or self.editable_mode else Path(self.build_lib)) / "manpp_kernels"
        return [str(path) for path in built.glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # setuptools runs build_ext only where there is an extension; its sources are CMake's business.
    ext_modules=[Extension("manpp_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
)
