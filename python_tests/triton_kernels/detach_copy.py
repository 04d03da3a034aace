"""detach_copy in Triton against PyTorch's copy: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import manpp_kernels
from manpp_kernels.backends import triton_interpreted
from manpp_kernels.backends.triton import detach_copy

DEVICE = "cpu" if triton_interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODULE = sys.modules[detach_copy.__module__]


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_casts(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for n in (0, 1, 9, MODULE.CHUNK, MODULE.CHUNK + 1):
        x = torch.randn(n, dtype=torch.float64, device=DEVICE).mul(100).to(dtypes[0])
        with manpp_kernels.use_backend("triton"):
            out = manpp_kernels.detach_copy(x, dtype=dtypes[1])
        assert torch.equal(out, x.to(dtypes[1]))
    view = torch.randn(50, device=DEVICE).to(dtypes[0])[3:40]
    out = torch.empty(38, dtype=dtypes[1], device=DEVICE)[1:]
    detach_copy(view, out)
    assert torch.equal(out, view.to(dtypes[1]))


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 70, 9, 9), (3, 8, 8, 16), (2, 2, 3, 4, 5), (4, 1, 3, 3), (1, 5, 1, 1)]
)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
)
def test_layout_changes(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    plain = torch.randn(shape, device=DEVICE).to(dtypes[0])
    for x, memory_format in ((plain, last), (plain.contiguous(memory_format=last), torch.contiguous_format)):
        with manpp_kernels.use_backend("triton"):
            out = manpp_kernels.detach_copy(x, dtype=dtypes[1], memory_format=memory_format)
        assert torch.equal(out, plain.to(dtypes[1]))
        assert out.is_contiguous(memory_format=memory_format)


def test_what_counts_as_a_transpose() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert MODULE.as_transpose(x, x.contiguous(memory_format=torch.channels_last)) == (2, 3, 20)
    assert MODULE.as_transpose(x.contiguous(memory_format=torch.channels_last), x) == (2, 20, 3)
    assert MODULE.as_transpose(x[0, 0], x[0, 0].t().contiguous().t()) == (1, 4, 5)
    assert MODULE.as_transpose(x, x) is None
    assert MODULE.as_transpose(x, x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)) is None
    assert MODULE.as_transpose(x[..., ::2], torch.empty(2, 3, 4, 3)) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    x = torch.arange(24, device=DEVICE).view(2, 3, 4)
    for source in (x.to(dtype), x.float()[..., ::2], x.float().expand(2, 2, 3, 4)):
        out = torch.empty(source.shape[::-1], dtype=dtype, device=DEVICE).permute(*reversed(range(source.dim())))
        detach_copy(source, out)
        assert torch.equal(out, source.to(dtype))
    out = torch.empty(2, 3, 2, device=DEVICE)
    detach_copy(x.float()[..., ::2], out)
    assert torch.equal(out, x.float()[..., ::2])
