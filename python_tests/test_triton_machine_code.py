"""The Triton kernels compiled ahead of time, without a GPU, and their machine code held to its bars.

One variant of each kernel is compiled for every target, and more of them for sm_90. MANPP_AOT=all compiles everything
for every target, as ``python -m manpp_kernels.backends.triton.aot`` does.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

from manpp_kernels.backends import triton_interpreted

if triton_interpreted():
    pytest.skip("Triton interprets in this process", allow_module_level=True)

from manpp_kernels.backends.triton import aot
from manpp_kernels.backends.triton.variants import VARIANTS

EVERYWHERE = [
    "update f32",
    "update and weights bf16",
    "update backward f32",
    "mix f32, planes",
    "mix backward bf16, channels last",
    "cast f32 to bf16",
    "transpose bf16",
]
ON_SM_90 = [
    "update bf16 from f32, stochastic",
    "update of all dtypes",
    "update and weights f32",
    "update and weights f32, some misaligned",
    "update backward bf16",
    "mix bf16, channels last",
    "mix backward f32, planes",
    "mix backward f32, maps only",
    "transpose f32",
]

if os.environ.get("MANPP_AOT") == "all":
    PAIRS = [(v, t) for v in VARIANTS for t in aot.TARGETS]
else:
    PAIRS = [(v, t) for v in EVERYWHERE for t in aot.TARGETS] + [(v, "sm_90") for v in ON_SM_90]


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, str], aot.Facts]:
    return aot.compile_pairs(PAIRS)


def test_every_kernel_is_compiled_for_every_target() -> None:
    kernels = {VARIANTS[v].kernel.__name__ for v in EVERYWHERE}
    assert kernels == {variant.kernel.__name__ for variant in VARIANTS.values()}
    assert len(kernels) == 6


@pytest.mark.parametrize(("variant", "target"), PAIRS)
def test_machine_code(facts: dict[tuple[str, str], aot.Facts], variant: str, target: str) -> None:
    found = facts[variant, target]
    # A kernel for every mix of dtypes may keep scalars of its branches in registers' stead on AMD; no other may.
    if target != "gfx942" or "all dtypes" not in variant:
        assert found.spilled == 0
    if target != "gfx942":  # 128: half of a multiprocessor's threads at once, which streaming needs
        assert found.registers <= (240 if "all dtypes" in variant else 128)
    assert found.shared <= 48 * 1024
    if VARIANTS[variant].wide:
        assert found.widest_load == 128
        assert found.widest_store == 128


@pytest.mark.parametrize("variant", ["update backward f32", "mix backward f32, planes"])
def test_reductions_do_not_add_floats_in_any_order(facts: dict[tuple[str, str], aot.Facts], variant: str) -> None:
    """The only additions to memory are those that count arrivals; they acquire and release."""
    ptx = facts[variant, "sm_90"].asm["ptx"]
    additions = [line for line in ptx.splitlines() if ("atom." in line or "red.global" in line) and ".add" in line]
    assert len(additions) == 1
    assert "acq_rel.add.u32" in additions[0]
