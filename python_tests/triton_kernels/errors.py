"""The public functions check their arguments alike whatever the backend: the misuses of the CPU's, on Triton."""

from __future__ import annotations

import misuse
import pytest

from manpp_kernels.backends import triton_interpreted

pytestmark = pytest.mark.skipif(not triton_interpreted(), reason="the misused tensors are the CPU's")


@pytest.mark.parametrize("case", misuse.EMA_SCALE_UPDATE)
def test_ema_scale_update(case: str) -> None:
    misuse.check_ema_scale_update(case, "triton")


@pytest.mark.parametrize("case", misuse.DETACH_COPY)
def test_detach_copy(case: str) -> None:
    misuse.check_detach_copy(case, "triton")


@pytest.mark.parametrize("case", misuse.SCALE_BIAS_MIX)
def test_scale_bias_mix(case: str) -> None:
    misuse.check_scale_bias_mix(case, "triton")
