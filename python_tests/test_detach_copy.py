"""``detach_copy``: values in every dtype, layout and size, isolation, and errors."""

from __future__ import annotations

import importlib
import itertools
import os

import misuse
import pytest
import torch
from conftest import BACKENDS_ON_CPU, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import CHUNK_SIZES, DTYPES, LAYOUTS, SIZES, Sample, count

from manpp_kernels import detach_copy

SHAPES = [(), (5,), (3, 7), (2, 3, 5), (2, 9, 3, 3), (3, 33, 9, 7), (2, 4, 3, 2, 3), (0, 3), (2, 0, 3)]
OTHER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize(("source", "result"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_dtype_and_size(target: Target, source: torch.dtype, result: torch.dtype) -> None:
    for n in SIZES + CHUNK_SIZES[::5]:
        x = Sample((n,), source, seed=n, device=target.device).view
        # A cast rounds to nearest, ties to even, as Tensor.to does: nothing else is correctly rounded.
        assert same(detach_copy(x, dtype=result), x.to(result))


@pytest.mark.parametrize(
    ("source", "result"), list(itertools.product(OTHER_DTYPES, (*OTHER_DTYPES, torch.float32))), ids=str
)
def test_integer_and_bool_dtypes(target: Target, source: torch.dtype, result: torch.dtype) -> None:
    x = torch.arange(70, device=target.device).remainder(5).to(source).view(2, 5, 7)
    assert same(detach_copy(x, dtype=result), x.to(result))
    assert same(detach_copy(x.transpose(0, 2), dtype=result), x.to(result).transpose(0, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("source", "result"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_pair_of_layouts(target: Target, source: str, result: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = Sample(shape, torch.float32, source, device=target.device)
        out = Sample(shape, dtype, result, seed=1, device=target.device)
        assert detach_copy(x.view, out.view) is out.view
        assert same(out.view, x.view.to(dtype))
        assert x.surroundings_untouched()
        assert out.surroundings_untouched()


@pytest.mark.parametrize("shape", [(3, 64, 31, 33), (1, 1, 5, 5), (2, 129, 1, 1), (2, 3, 65, 64), (1, 257, 16, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_formats(target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = Sample(shape, torch.float32, device=target.device).view
    for start, end in itertools.permutations([torch.contiguous_format, torch.channels_last]):
        y = detach_copy(x.contiguous(memory_format=start), dtype=dtype, memory_format=end)
        assert y.is_contiguous(memory_format=end)
        assert y.stride() == x.to(memory_format=end).contiguous(memory_format=end).stride()
        assert same(y, x.to(dtype))


@pytest.mark.parametrize("shape", [(3, 64, 31, 33), (2, 129, 1, 9), (1, 257, 16, 17), (2, 70, 8, 9), (1, 7, 9, 3)])
def test_transpositions_of_every_pair_of_dtypes_and_alignment(target: Target, shape: tuple[int, ...]) -> None:
    """Whole tiles, tails of both kinds, and targets that start in the middle of a vector."""
    formats = (torch.contiguous_format, torch.channels_last)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for source, result, offset in itertools.product(dtypes, dtypes, (0, 1, 3)):
        x = torch.randn(shape, device=target.device).to(source)
        for start, end in itertools.product(formats, formats):
            memory = torch.full((x.numel() + offset + 5,), 7.0, dtype=result, device=target.device)
            stride = torch.empty(shape, device="meta").contiguous(memory_format=end).stride()
            out = memory.as_strided(shape, stride, offset)
            detach_copy(x.contiguous(memory_format=start), out)
            assert same(out, x.to(result)), (source, result, start, end, offset)
            assert count(memory[:offset], 7.0) == offset
            assert count(memory[offset + x.numel() :], 7.0) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_change_of_layout_alone_keeps_every_bit(target: Target, dtype: torch.dtype) -> None:
    """Also those of NaNs, which a conversion to float and back would lose."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=target.device).to(torch.int16).view(2, 64, 16, 32)
    for start, end in itertools.permutations([torch.contiguous_format, torch.channels_last]):
        y = detach_copy(bits.view(dtype).contiguous(memory_format=start), memory_format=end)
        assert torch.equal(y.contiguous().view(torch.int16), bits)


@pytest.mark.parametrize("shape", [(3, 65, 239, 241), (2, 9, 601, 1039)])
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16], ids=str)
def test_results_larger_than_the_caches(result: torch.dtype, shape: tuple[int, ...]) -> None:
    """Streamed past the caches, into fresh memory and to an odd address; line by line, and whole tiles at a time."""
    x = torch.randn(shape).to(torch.bfloat16)
    for end in (torch.contiguous_format, torch.channels_last):
        assert same(detach_copy(x, dtype=result, memory_format=end), x.to(result))
    out = torch.empty(x.numel() + 1, dtype=result)[1:].view(x.shape)
    assert same(detach_copy(x, out), x.to(result))


def test_the_layout_is_kept_by_default(target: Target) -> None:
    for layout in ("contiguous", "channels_last", "transposed"):
        x = Sample((2, 3, 4, 5), torch.float32, layout, device=target.device).view
        assert detach_copy(x).stride() == x.stride()
    volume = torch.randn(2, 3, 4, 5, 6, device=target.device)
    y = detach_copy(volume, memory_format=torch.channels_last_3d)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert same(y, volume)
    assert same(detach_copy(volume[:1].expand(3, -1, -1, -1, -1)), volume[:1].expand(3, -1, -1, -1, -1))


def test_channels_innermost_and_the_rest_in_another_order(target: Target) -> None:
    """Dense, with channels side by side, and yet not channels_last."""
    last = torch.randn(3, 5, 4, 6, device=target.device).to(memory_format=torch.channels_last)
    sequence = torch.randn(7, 3, 20, device=target.device).permute(1, 2, 0)  # (N, C, T) of [T][N][C]
    volume = torch.randn(3, 4, 2, 6, 5, device=target.device).permute(0, 4, 3, 1, 2)
    for x in (last.transpose(2, 3), last.transpose(0, 2), sequence, volume, volume[:1]):
        for dtype in (torch.float32, torch.bfloat16):
            assert same(detach_copy(x, dtype=dtype, memory_format=torch.contiguous_format), x.to(dtype))
            out = torch.empty_like(x, dtype=dtype)
            assert same(detach_copy(x.contiguous(), out), x.to(dtype))
            assert out.stride() == x.stride()


def test_the_common_case_takes_the_short_way(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past what the long way begins with, in every memory format, for a new result and a given one."""
    long = []
    module = importlib.import_module("manpp_kernels.ops.detach_copy")
    monkeypatch.setattr(module, "check_tensor", lambda name, t: long.append(name))
    image, volume = torch.randn(2, 3, 4, 5, device=target.device), torch.randn(2, 3, 4, 5, 6, device=target.device)
    formats = (None, torch.preserve_format, torch.contiguous_format)
    for x, own in ((image, torch.channels_last), (volume, torch.channels_last_3d)):
        for dtype, memory_format in itertools.product((None, torch.bfloat16), (*formats, own)):
            y = detach_copy(x, dtype=dtype, memory_format=memory_format)
            assert same(detach_copy(x, y), x.to(dtype or x.dtype))
            assert y.is_contiguous(memory_format=own if memory_format is own else torch.contiguous_format)
    assert bool(long) == (target.backend not in ("cpu", "cuda"))


def test_isolation(target: Target) -> None:
    x = torch.randn(3, 4, device=target.device, requires_grad=True)
    y = detach_copy(x * 2)
    assert not y.requires_grad
    assert y.grad_fn is None
    y.requires_grad_()
    (y * x).sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert y.grad is not None
    same_dtype = detach_copy(x)
    assert same_dtype.data_ptr() != x.data_ptr(), "a copy, also where nothing is cast"


def test_special_values_and_bits(target: Target) -> None:
    x = torch.tensor(
        [float("inf"), float("-inf"), float("nan"), -0.0, 1e-45, 3.4e38, 65520.0, 65519.0] * 5, device=target.device
    )
    for dtype in DTYPES:
        y = detach_copy(x, dtype=dtype)
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        # The sign of a NaN that is cast is nobody's promise (x86's and torch's own differ), that of a zero is.
        assert torch.equal(torch.signbit(y)[~x.isnan()], torch.signbit(x)[~x.isnan()])
    payload = torch.tensor([0x7FC12345, 0x00000001], dtype=torch.int32, device=target.device).view(torch.float32)
    assert torch.equal(detach_copy(payload).view(torch.int32), payload.view(torch.int32)), (
        "a plain copy keeps every bit"
    )


def test_every_bfloat16_and_float16_value(target: Target) -> None:
    bits = torch.arange(-(2**15), 2**15, device=target.device).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)
        for result in DTYPES:
            torch.testing.assert_close(detach_copy(x, dtype=result), x.to(result), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 9), max_size=5).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
)
def test_any_pair(target: Target, shape, dtypes, layouts) -> None:
    x, out = (Sample(shape, dtypes[i], layouts[i], seed=i, device=target.device) for i in range(2))
    detach_copy(x.view, out.view)
    assert same(out.view, x.view.to(dtypes[1]))
    assert out.surroundings_untouched()


def test_storage_that_was_freed_is_an_error(target: Target) -> None:
    x = torch.ones(2, 3, device=target.device)
    view = x[1:]
    x.untyped_storage().resize_(0)
    for t in (x, view):
        for out in (None, torch.zeros(t.shape, device=target.device)):
            with pytest.raises(ValueError, match="x has no memory: its storage was freed"):
                detach_copy(t, out)
    assert detach_copy(x[:0]).shape == (0, 3)


def test_autograd_sees_the_write(target: Target) -> None:
    out = torch.randn(4, device=target.device)
    loss = (torch.randn(4, device=target.device, requires_grad=True) * out).sum()
    detach_copy(torch.ones(4, device=target.device), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(target: Target) -> None:
    with torch.inference_mode():
        x = torch.ones(3, device=target.device)
        assert same(detach_copy(x, torch.empty_like(x)), x)
    assert same(detach_copy(x), x.clone())


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("case", misuse.DETACH_COPY)
def test_misuse(case: str, backend: str) -> None:
    misuse.check_detach_copy(case, backend)


@pytest.mark.skipif(not os.environ.get("MANPP_TEST_LARGE"), reason="needs 9 GB: set MANPP_TEST_LARGE=1")
def test_more_than_2_to_31_elements(target: Target) -> None:
    if target == Target("eager", "cpu"):
        pytest.skip("its temporaries need 40 GB")
    x = torch.zeros(2**31 + 17, dtype=torch.int8, device=target.device)
    x[-1] = 4
    y = detach_copy(x, dtype=torch.bfloat16)
    assert y[-1].item() == 4.0
    assert count(y, 0.0) == len(y) - 1


def test_transforms_of_torch_func() -> None:
    x = torch.randn(3, 2, 4, 5)
    copied = torch.func.vmap(lambda y: detach_copy(y, dtype=torch.bfloat16))(x)
    assert same(copied, x.to(torch.bfloat16))
    assert torch.equal(torch.func.vmap(detach_copy)(x, torch.zeros_like(x)), x)
    gradient = torch.func.grad(lambda y: (detach_copy(y) * y).sum())(x)
    assert torch.equal(gradient, x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for copied in (detach_copy(dual), detach_copy(dual, torch.empty_like(x))):
            assert torch.autograd.forward_ad.unpack_dual(copied).tangent is None
            assert torch.equal(copied, x)
