"""``ema_scale_update``: values, layouts, sizes, dtypes, gradients. Errors and rounding have files of their own."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from conftest import TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    CHUNK_SIZES,
    DTYPES,
    LAYOUTS,
    SIZES,
    Sample,
    assert_effective_weights,
    assert_ema_step,
    clones,
    count,
    samples,
)

from manpp_kernels import ema_scale_update

SHAPES = [(), (5,), (3, 7), (2, 3, 5), (2, 9, 3, 3), (2, 4, 3, 2, 3), (1, 1, 1), (0, 3)]


@pytest.mark.parametrize(("ema_dtype", "params_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_dtype_and_size(target: Target, ema_dtype: torch.dtype, params_dtype: torch.dtype) -> None:
    shapes = [(n,) for n in SIZES]
    ema = [s.view for s in samples(shapes, ema_dtype, device=target.device)]
    params = [s.view for s in samples(shapes, params_dtype, seed=100, device=target.device)]
    before, unchanged = clones(ema), clones(params)
    assert ema_scale_update(ema, params, 0.9) is None
    assert_ema_step(ema, before, params, 0.9)
    assert all(torch.equal(p, u) for p, u in zip(params, unchanged, strict=True))


@pytest.mark.parametrize("ema_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("params_dtype", "bias_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_dtype_with_effective_weights(
    target: Target, ema_dtype: torch.dtype, params_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    shapes = [(n,) for n in SIZES[::2]]
    ema = [s.view for s in samples(shapes, ema_dtype, device=target.device)]
    params = [s.view for s in samples(shapes, params_dtype, seed=100, device=target.device)]
    bias = [s.view for s in samples(shapes, bias_dtype, seed=200, device=target.device)]
    scale = torch.tensor(0.75, device=target.device)
    before = clones(ema)
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias)
    # A float64 bias lifts the arithmetic of the whole triple.
    assert_ema_step(ema, before, [p.double() for p in params] if bias_dtype == torch.float64 else params, 0.9)
    assert_effective_weights(weights, ema, bias, [0.75] * len(ema), 2.0)


def test_mixed_dtypes_in_one_call(target: Target) -> None:
    combinations = list(itertools.product(DTYPES, DTYPES, DTYPES))
    make = [
        Sample((37,), d, seed=i * 7 + j, device=target.device).view
        for i, c in enumerate(combinations)
        for j, d in enumerate(c)
    ]
    ema, params, bias = make[0::3], make[1::3], make[2::3]
    before = clones(ema)
    groups = [i % 5 for i in range(len(ema))]
    scales = [0.5, 1.0, -1.0, 2.0, 0.0]
    weights = ema_scale_update(
        ema, params, 0.25, scale=torch.tensor(scales, device=target.device), bias=bias, groups=groups, total=1.5
    )
    assert_ema_step(ema, before, params, 0.25)
    assert_effective_weights(weights, ema, bias, [scales[g] for g in groups], 1.5)


@pytest.mark.parametrize(("ema_layout", "params_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_pair_of_layouts(target: Target, ema_layout: str, params_layout: str) -> None:
    for ema_dtype, params_dtype in [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16,) * 2,
    ]:
        ema = samples(SHAPES, ema_dtype, ema_layout, device=target.device)
        params = samples(SHAPES, params_dtype, params_layout, seed=50, device=target.device)
        before = clones(s.view for s in ema)
        ema_scale_update([s.view for s in ema], [s.view for s in params], 0.7)
        assert_ema_step([s.view for s in ema], before, [s.view for s in params], 0.7)
        assert all(s.surroundings_untouched() for s in ema + params)


@pytest.mark.parametrize("bias_layout", LAYOUTS)
@pytest.mark.parametrize("ema_layout", LAYOUTS)
def test_effective_weights_in_every_layout(target: Target, ema_layout: str, bias_layout: str) -> None:
    ema = samples(SHAPES, torch.float32, ema_layout, device=target.device)
    params = [s.view for s in samples(SHAPES, torch.float32, "contiguous", seed=50, device=target.device)]
    bias = samples(SHAPES, torch.float32, bias_layout, seed=90, device=target.device)
    views, biases = [s.view for s in ema], [s.view for s in bias]
    before = clones(views)
    weights = ema_scale_update(views, params, 0.7, scale=torch.tensor(0.3, device=target.device), bias=biases)
    assert_ema_step(views, before, params, 0.7)
    scale = torch.tensor(0.3).item()
    assert_effective_weights(weights, views, biases, [scale] * len(views), 2.0)
    for w, b in zip(weights, biases, strict=True):
        assert w.stride() == torch.empty_like(b).stride(), "weights are laid out like bias"
    assert all(s.surroundings_untouched() for s in ema + bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_around_every_chunk_size(target: Target, dtype: torch.dtype) -> None:
    ema = [s.view for s in samples([(n,) for n in CHUNK_SIZES], dtype, device=target.device)]
    params = [s.view for s in samples([(n,) for n in CHUNK_SIZES], dtype, seed=40, device=target.device)]
    before = clones(ema)
    ema_scale_update(ema, params, 0.995)
    assert_ema_step(ema, before, params, 0.995)


def test_params_with_gaps_beside_a_dense_ema(target: Target) -> None:
    """Of strides that differ in the last dimension alone."""
    ema, params = torch.randn(7, 3, device=target.device).t(), torch.randn(7, 6, device=target.device)[:, :3].t()
    before = [ema.clone()]
    ema_scale_update(ema, params, 0.5)
    assert_ema_step([ema], before, [params], 0.5)


def test_large_non_contiguous(target: Target) -> None:
    """Large enough for several threads or blocks each, in the layouts that cannot be read as one stretch."""
    for layout in ("channels_last", "transposed", "sliced", "columns", "misaligned"):
        ema = Sample((64, 33, 9, 11), torch.float32, layout, device=target.device)
        params = Sample((64, 33, 9, 11), torch.bfloat16, "contiguous", seed=1, device=target.device)
        before = [ema.view.clone()]
        ema_scale_update(ema.view, params.view, 0.5)
        assert_ema_step([ema.view], before, [params.view], 0.5, what=layout)
        assert ema.surroundings_untouched()


def test_thousands_of_tensors(target: Target) -> None:
    sizes = [i % 19 for i in range(3000)]
    ema = list(torch.randn(sum(sizes), device=target.device).split(sizes))
    params = [p.to(DTYPES[i % 4]) for i, p in enumerate(torch.randn(sum(sizes), device=target.device).split(sizes))]
    before = clones(ema)
    ema_scale_update(ema, params, 0.9)
    assert_ema_step(ema, before, params, 0.9)


def test_empty_lists_and_single_tensors(target: Target) -> None:
    assert ema_scale_update([], [], 0.9) is None
    assert ema_scale_update([], [], 0.9, scale=torch.ones((), device=target.device), bias=[]) == []
    ema, params = torch.ones(3, device=target.device), torch.zeros(3, device=target.device)
    assert ema_scale_update(ema, params, 0.5) is None
    assert ema.tolist() == [0.5] * 3
    (weights,) = ema_scale_update(ema, params, 1.0, scale=torch.ones(1, device=target.device), bias=params + 1)
    assert weights.tolist() == [1.5] * 3
    assert ema_scale_update((ema,), (params,), 0) is None, "tuples and an integer momentum"
    assert ema.tolist() == [0.0] * 3


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.9999, 1.0, 1e-9, 1 - 2**-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_momenta(target: Target, dtype: torch.dtype, momentum: float) -> None:
    ema, params = torch.randn(2, 1000, dtype=dtype, device=target.device).unbind()
    before = ema.clone()
    ema_scale_update(ema, params, momentum)
    # 1 - momentum is taken in float64: at 1 - 2^-30 a float32 difference would be 0.
    assert_ema_step([ema], [before], [params], momentum)
    if momentum == 0.0:
        assert torch.equal(ema, params)
    if momentum == 1.0:
        assert torch.equal(ema, before)


@pytest.mark.parametrize("momentum_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_as_a_tensor(target: Target, dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    momentum = torch.tensor(0.995, dtype=momentum_dtype, device=target.device)
    ema, params = torch.randn(2, 1000, device=target.device).to(dtype).unbind()
    before, same = ema.clone(), ema.clone()
    ema_scale_update(ema, params, momentum)
    assert_ema_step([ema], [before], [params], momentum.item())
    ema_scale_update(same, params, momentum.item())
    assert torch.equal(ema, same), "the same number gives the same EMA, as a float or as a tensor"


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total", [2.0, 1.0, 0.0, 1.7])
def test_scale_dtypes_and_totals(target: Target, scale_dtype: torch.dtype, total: float) -> None:
    scale = torch.tensor([0.3, 1.1, 0.7], dtype=scale_dtype, device=target.device)[1:]  # a misaligned one, at that
    for dtype in (torch.float32, torch.float64):
        ema, params, bias = torch.randn(3, 2, 50, dtype=dtype, device=target.device).unbind()
        before = clones(ema)
        weights = ema_scale_update(
            list(ema), list(params), 0.9, scale=scale, bias=list(bias), groups=[1, 0], total=total
        )
        assert_ema_step(ema, before, params, 0.9)
        assert_effective_weights(weights, ema, bias, [scale[1].item(), scale[0].item()], total)
        if dtype == scale_dtype == torch.float64:
            exact = scale[1].item() * bias[0] + (total - scale[1].item()) * ema[0]
            torch.testing.assert_close(weights[0], exact, rtol=1e-14, atol=1e-14)


def test_params_may_be_shared_expanded_or_the_bias(target: Target) -> None:
    """Only what is written has to lie apart."""
    ema = list(torch.randn(2, 4, 6, device=target.device).unbind())
    shared = torch.randn(1, 6, device=target.device).expand(4, 6)
    before = clones(ema)
    scale = torch.ones((), device=target.device)
    weights = ema_scale_update(ema, [shared, shared], 0.9, scale=scale, bias=[shared, shared])
    assert_ema_step(ema, before, [shared, shared], 0.9)
    assert_effective_weights(weights, ema, [shared, shared], [1.0, 1.0], 2.0)


def test_interleaved_columns_of_one_matrix(target: Target) -> None:
    matrix = torch.randn(33, 4, device=target.device)
    before = matrix.clone()
    ema, params = [matrix[:, 0], matrix[:, 2]], [matrix[:, 1], matrix[:, 3]]
    ema_scale_update(ema, params, 0.5)
    assert_ema_step(ema, [before[:, 0], before[:, 2]], [before[:, 1], before[:, 3]], 0.5)
    assert torch.equal(matrix[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].backend != "eager"], indirect=True)
@pytest.mark.parametrize("ema_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_effective_weights_too_large_for_the_caches(target: Target, ema_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """More than 32 MB of weights, which the CPU's kernel writes otherwise; eager has one way for all."""
    sizes = (0, (33 << 20) // dtype.itemsize, 1, 1049)
    ema = [torch.randn(n, dtype=ema_dtype, device=target.device) for n in sizes]
    params, bias = ([torch.randn(n, dtype=dtype, device=target.device) for n in sizes] for _ in range(2))
    before = clones(ema)
    weights = ema_scale_update(ema, params, 0.75, scale=torch.tensor(0.5, device=target.device), bias=bias)
    # Compared in pieces that fit the caches: the oracle's float64 of all at once would take twice as long.
    ema, before, params, bias, weights = (
        [piece for t in tensors for piece in t.split(1 << 16)] for tensors in (ema, before, params, bias, weights)
    )
    assert_ema_step(ema, before, params, 0.75)
    assert_effective_weights(weights, ema, bias, [0.5] * len(ema), 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(target: Target, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    small = torch.finfo(dtype).smallest_normal / 4  # subnormal, and not to be flushed to zero
    largest = torch.finfo(dtype).max
    ema = torch.tensor([inf, -inf, nan, 1.0, inf, 0.0, largest, small] * 5, dtype=dtype, device=target.device)
    params = torch.tensor([1.0, 1.0, 1.0, nan, -inf, inf, largest, small] * 5, dtype=dtype, device=target.device)
    ema_scale_update(ema, params, 0.5)
    expected = torch.tensor([inf, -inf, nan, nan, nan, inf, largest, small] * 5, dtype=dtype, device=target.device)
    torch.testing.assert_close(ema, expected, equal_nan=True, rtol=0, atol=0)


def test_float16_overflows_to_infinity(target: Target) -> None:
    ema, params = (
        torch.zeros(33, dtype=torch.float16, device=target.device),
        torch.full((33,), 1e6, device=target.device),
    )
    ema_scale_update(ema, params, 0.5)
    assert torch.isposinf(ema).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 6), max_size=4).map(tuple),
            *[st.sampled_from(DTYPES)] * 3,
            *[st.sampled_from(LAYOUTS)] * 3,
            st.integers(0, 2),
        ),
        max_size=6,
    ),
    momentum=st.floats(0, 1),
    scales=st.tuples(*[st.floats(-2, 2, width=32)] * 3),
    total=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_list(target: Target, tensors, momentum, scales, total, seed) -> None:
    columns: list[list[Sample]] = [
        [Sample(t[0], t[1 + k], t[4 + k], seed=seed + 10 * i + k, device=target.device) for i, t in enumerate(tensors)]
        for k in range(3)
    ]
    ema, params, bias = ([s.view for s in column] for column in columns)
    groups = [t[7] for t in tensors]
    before, alone = clones(ema), clones(ema)
    scale = torch.tensor(scales, device=target.device)
    weights = ema_scale_update(ema, params, momentum, scale=scale, bias=bias, groups=groups, total=total)
    assert_ema_step(ema, before, params, momentum)
    assert_effective_weights(weights, ema, bias, [scales[g] for g in groups], total)
    assert all(s.surroundings_untouched() for column in columns for s in column)
    # One call for all is one call for each.
    for i, g in enumerate(groups):
        (w,) = ema_scale_update(alone[i], params[i], momentum, scale=scale[g], bias=bias[i], total=total)
        assert torch.equal(alone[i], ema[i])
        assert torch.equal(w, weights[i])


def test_stays_between_ema_and_params(target: Target) -> None:
    ema, params = torch.randn(2, 5000, device=target.device).unbind()
    low, high = torch.minimum(ema, params), torch.maximum(ema, params)
    ema_scale_update(ema, params, 0.3)
    slack = 2**-22 * torch.maximum(low.abs(), high.abs())
    assert ((ema >= low - slack) & (ema <= high + slack)).all()


def test_autograd_sees_the_write(target: Target) -> None:
    weight = torch.randn(4, device=target.device, requires_grad=True)
    ema, params = torch.randn(2, 4, device=target.device).unbind()
    ema = ema.clone()
    loss = (weight * ema).sum()
    ema_scale_update(ema, params, 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # The effective weights keep the EMA they were made of, too, when scale wants its gradient.
    scale = torch.ones((), device=target.device, requires_grad=True)
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=params)
    ema_scale_update(ema, params, 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights[0].sum().backward()


def test_inference_mode_and_parameters(target: Target) -> None:
    with torch.inference_mode():
        ema, params = torch.ones(3, device=target.device), torch.zeros(3, device=target.device)
        ema_scale_update(ema, params, 0.5)
    assert ema.tolist() == [0.5] * 3
    module = torch.nn.Linear(3, 3, device=target.device)
    average = [p.detach().clone() for p in module.parameters()]
    before = clones(average)
    module.weight.data.mul_(2)
    ema_scale_update(average, module.parameters(), 0.5)  # any iterable, of parameters that require grad
    assert_ema_step(average, before, list(module.parameters()), 0.5)


def test_meta_tensors() -> None:
    ema, params, bias = ([torch.empty(8, device="meta") for _ in range(2)] for _ in range(3))
    weights = ema_scale_update(ema, params, 0.9, scale=torch.ones((), device="meta"), bias=bias)
    assert [w.shape for w in weights] == [(8,), (8,)]
    assert weights[0].is_meta


@pytest.mark.skipif(not os.environ.get("MANPP_TEST_LARGE"), reason="needs 13 GB: set MANPP_TEST_LARGE=1")
def test_more_than_2_to_31_elements(target: Target) -> None:
    if target == Target("eager", "cpu"):
        pytest.skip("its temporaries need 40 GB")
    n = 2**31 + 17
    ema = torch.zeros(n, dtype=torch.bfloat16, device=target.device)
    params = torch.ones(n, dtype=torch.bfloat16, device=target.device)
    at = [0, 1, 2**31 - 1, 2**31, n - 1]
    params[at] = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.bfloat16, device=target.device)
    ema_scale_update(ema, params, 0.5)
    assert ema[at].tolist() == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert count(ema, 0.5) == n - len(at)
