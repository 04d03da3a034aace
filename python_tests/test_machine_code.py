"""The machine code of the CUDA kernels: no spills, no local memory, 128-bit accesses where the work is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}

sys.path.insert(0, str(ROOT / "tools"))
import machine_code  # noqa: E402


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library where it has CUDA kernels for every architecture, else one built for this."""
    from manpp_kernels import backends

    if backends.CUDA_COMPILED:
        from manpp_kernels import _C

        if set(_C.cuda_architectures().split(",")) >= ARCHITECTURES:
            return Path(_C.__file__)
    if shutil.which(os.environ.get("CUDACXX", "nvcc")) is None:
        pytest.skip("nvcc was not found, so there are no CUDA kernels to look at")
    build = tmp_path_factory.mktemp("cuda")
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DMANPP_CUDA=on", f"-DMANPP_OUTPUT_DIR={build}", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0;9.0;10.0"}
    for command in (configure, ["cmake", "--build", str(build), "--target", "_C", "--parallel", "2"]):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-6000:]
    return build / "_C.abi3.so"


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[machine_code.Kernel]:
    try:
        return machine_code.kernels_of(library)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_every_architecture_has_every_kernel(kernels: list[machine_code.Kernel]) -> None:
    names = {a: {k.name for k in kernels if k.architecture == a} for a in ARCHITECTURES}
    assert all(len(found) > 60 for found in names.values()), {a: len(found) for a, found in names.items()}
    assert names["sm_80"] == names["sm_90"] == names["sm_100"]


def test_no_kernel_misses_a_bar(kernels: list[machine_code.Kernel]) -> None:
    assert [f"{k.architecture} {k.name}: {k.missed}" for k in kernels if k.missed] == []
    vectorised = {k.name.split("<")[0] for k in kernels if machine_code.VECTORISED.match(k.name)}
    of_weights = [k for k in kernels if k.name.startswith("backward_kernel<") and not k.name.endswith("void>")]
    assert of_weights
    assert all(machine_code.VECTORISED.match(k.name) for k in of_weights)
    assert vectorised >= {"typed_kernel", "cast_kernel", "mix_kernel", "backward_kernel", "backward_rows_kernel"}


def test_every_kernel_keeps_a_multiprocessor_busy(kernels: list[machine_code.Kernel]) -> None:
    # Three blocks, of 256 threads with several loads of 16 bytes in flight each, cover the latency of memory; or two
    # whose threads have a dozen on their way.
    def least(kernel: machine_code.Kernel) -> float:
        return 2 / 8 if kernel.accesses["load", 128] >= 12 else 3 / 8

    assert [(k.architecture, k.name, k.registers) for k in kernels if k.occupancy < least(k)] == []


def test_what_it_reads() -> None:
    mangled = "_ZN5manpp4cuda46_GLOBAL__N__a_mix_kernelIfLNS0_1_4ModeE2EEEvPKT_"  # of no kernel: left as it is
    assert machine_code._short(mangled) == mangled
    home = "manpp::cuda::(anonymous namespace)::"
    name = f"void {home}mix_kernel<c10::Half, ({home}Mode)1>(int)"
    assert machine_code._short(name) == "mix_kernel<float16, Row>"
    kernel = machine_code.Kernel("mix_kernel<float16, Row>", "sm_90", registers=80)
    assert kernel.occupancy == 3 / 8
    assert kernel.missed == ["no 128-bit load", "no 128-bit store"]
    kernel = machine_code.Kernel("cast_kernel<float, float16>", "sm_90", registers=80)
    kernel.accesses["load", 128] += 1
    assert kernel.missed == ["no 64-bit store"]
    kernel.accesses["store", 64] += 1
    assert kernel.missed == []
