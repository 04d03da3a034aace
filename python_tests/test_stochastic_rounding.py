"""Stochastic rounding of a bfloat16 or float16 EMA: between its neighbours, unbiased, reproducible, never stalling."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TARGETS, Target
from reference import LAYOUTS, SIZES, Sample
from torch import Tensor

import manpp_kernels
from manpp_kernels import ema_scale_update

LOW = (torch.bfloat16, torch.float16)


def rounded(x: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """float32 ``x``, stored in ``dtype``: momentum 0 makes the EMA the parameter itself, with no rounding before."""
    ema = torch.zeros_like(x, dtype=dtype)
    torch.manual_seed(seed)
    ema_scale_update(ema, x, 0.0, rounding="stochastic")
    return ema


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest value of ``dtype`` that is not above ``x``, and the smallest that is not below."""
    nearest = x.to(dtype)
    infinity = torch.full_like(nearest, math.inf)
    low = torch.where(nearest.double() > x.double(), torch.nextafter(nearest, -infinity), nearest)
    high = torch.where(nearest.double() < x.double(), torch.nextafter(nearest, infinity), nearest)
    return low, high


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_between_the_neighbours(target: Target, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)  # every exponent, both signs, subnormals
    x = x[x.abs() <= torch.finfo(dtype).max].to(target.device)
    low, high = neighbours(x, dtype)
    got = rounded(x, dtype)
    assert ((got == low) | (got == high)).all()
    assert (got[low == high] == x[low == high].to(dtype)).all(), "what can be stored is stored"
    inside = low != high
    assert 0.4 < (got == high)[inside].double().mean() < 0.6, "both ways, about as often"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_layout(target: Target, dtype: torch.dtype, layout: str) -> None:
    ema = Sample((3, 5, 7, 2), dtype, layout, device=target.device)
    x = torch.randn(3, 5, 7, 2, device=target.device)
    ema_scale_update(ema.view, x, 0.0, rounding="stochastic")
    low, high = neighbours(x, dtype)
    assert ((ema.view == low) | (ema.view == high)).all()
    assert ema.surroundings_untouched()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, 1.9999, 1e-3, 3.14159e4, 6.1e-5, 3e-5, -1.23e-6, 4e-8])
def test_unbiased(target: Target, dtype: torch.dtype, value: float) -> None:
    n = 200_000
    x = torch.full((n,), value, device=target.device)
    low, high = (t[0].item() for t in neighbours(x, dtype))
    mean = rounded(x, dtype, seed=7).double().mean().item()
    # Hoeffding: n values in {low, high} of mean x miss it by more than this with a probability below 1e-9.
    allowed = (high - low) * math.sqrt(math.log(2 / 1e-9) / (2 * n))
    assert abs(mean - x[0].item()) <= allowed


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_odds_follow_the_distance(target: Target, dtype: torch.dtype) -> None:
    n = 100_000
    step = torch.finfo(dtype).eps
    for share in (0.02, 0.25, 0.5, 0.75, 0.98):
        up = (
            (rounded(torch.full((n,), 1 + share * step, device=target.device), dtype, seed=3) > 1)
            .double()
            .mean()
            .item()
        )
        assert abs(up - share) <= math.sqrt(math.log(2 / 1e-9) / (2 * n))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_special_values(target: Target, dtype: torch.dtype) -> None:
    inf, largest = math.inf, torch.finfo(dtype).max
    past = 3.4e38 if dtype == torch.bfloat16 else 65520.0  # what rounds to infinity
    x = torch.tensor([inf, -inf, math.nan, 0.0, largest, -largest, past, -past] * 3, device=target.device)
    got = rounded(x, dtype)
    torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.isinf(), x.abs() >= past)


def test_reproducible_under_manual_seed(target: Target) -> None:
    params = torch.randn(5000, device=target.device)

    def two_steps(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        first, second = torch.zeros(2, 5000, dtype=torch.bfloat16, device=target.device).unbind()
        ema_scale_update(first, params, 0.3, rounding="stochastic")
        ema_scale_update(second, params, 0.3, rounding="stochastic")
        return first, second

    a, b = two_steps(11), two_steps(11)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1]), "each call draws its own bits"
    assert not torch.equal(a[0], two_steps(12)[0])


def test_a_generator_of_its_own(target: Target) -> None:
    params = torch.randn(5000, device=target.device)
    emas = []
    for seed in (3, 3, 4):
        generator = torch.Generator(target.device).manual_seed(seed)
        state = torch.get_rng_state()
        for update in (manpp_kernels.ema_scale_update, lambda e, p, m, **o: manpp_kernels.EmaPlan(e, p, **o).update(m)):
            emas.append(torch.zeros(5000, dtype=torch.bfloat16, device=target.device))
            update(emas[-1], params, 0.3, rounding="stochastic", generator=generator)
            generator.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), state), "the default generator is left alone"
    assert all(torch.equal(emas[0], e) for e in emas[:4])
    assert not torch.equal(emas[0], emas[4])


def test_nearest_draws_no_random_numbers(target: Target) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3, device=target.device)
    torch.manual_seed(5)
    ema_scale_update(torch.zeros(3, device=target.device), torch.ones(3, device=target.device), 0.5)
    assert torch.equal(torch.rand(3, device=target.device), expected)


def test_elements_and_tensors_draw_apart(target: Target) -> None:
    """No two elements share their bits: neither within a tensor, nor across the tensors of a call."""
    n, tensors = 4096, 8
    ema = [torch.zeros(n, dtype=torch.bfloat16, device=target.device) for _ in range(tensors)]
    half = 1 + torch.finfo(torch.bfloat16).eps / 2
    ema_scale_update(ema, [torch.full((n,), half, device=target.device)] * tensors, 0.0, rounding="stochastic")
    up = torch.stack([e > 1 for e in ema]).double().cpu() * 2 - 1
    # Correlations of fair coins: by Hoeffding none of them is above this with a probability below 1e-9 each.
    allowed = math.sqrt(2 * math.log(2 / 1e-9) / n)
    between = (up @ up.T / n - torch.eye(tensors)).abs().max()
    assert between <= allowed
    for lag in (1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256, 1024):
        assert ((up[:, lag:] * up[:, :-lag]).mean(1).abs() <= allowed * math.sqrt(n / (n - lag))).all(), lag


def test_other_dtypes_are_not_touched_by_it(target: Target) -> None:
    params = torch.randn(1000, device=target.device)
    for dtype in (torch.float32, torch.float64):
        nearest, stochastic = torch.ones(2, 1000, dtype=dtype, device=target.device).unbind()
        ema_scale_update(nearest, params, 0.3)
        ema_scale_update(stochastic, params, 0.3, rounding="stochastic")
        assert torch.equal(nearest, stochastic)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_slow_ema_moves_where_nearest_stalls(target: Target, dtype: torch.dtype) -> None:
    steps, n = 500, 2000
    momentum = 0.999 if dtype == torch.bfloat16 else 0.9999
    params = torch.zeros(n, device=target.device)
    stalled, moving = torch.ones(2, n, dtype=dtype, device=target.device).unbind()
    for _ in range(steps):
        ema_scale_update(stalled, params, momentum)
        ema_scale_update(moving, params, momentum, rounding="stochastic")
    expected = momentum**steps
    assert (stalled == 1).all()
    assert (moving < 1).any()
    # A martingale: each step moves an element by at most one unit (eps/2 below 1) from its mean, and the elements are
    # independent, so the mean misses by more than this with a probability below 1e-9 (Azuma-Hoeffding).
    allowed = torch.finfo(dtype).eps / 2 * math.sqrt(2 * steps * math.log(2 / 1e-9) / n)
    assert abs(moving.double().mean().item() - expected) <= allowed


def test_effective_weights_come_from_the_ema_as_stored(target: Target) -> None:
    params = torch.randn(1000, device=target.device)
    ema = torch.zeros(1000, dtype=torch.bfloat16, device=target.device)
    scale, bias = torch.tensor(0.5, device=target.device), torch.zeros(1000, device=target.device)
    (weights,) = ema_scale_update(ema, params, 0.0, scale=scale, bias=bias, rounding="stochastic")
    assert torch.equal(weights, ema.float() * 1.5)


@pytest.mark.parametrize("other", [t for t in TARGETS if t.values[0].backend != "eager"])
def test_every_backend_draws_the_same_bits(other: Target) -> None:
    """The bits are a function of seed, tensor and place in memory, so that a run can move between backends."""
    shapes = [(n,) for n in SIZES] + [(3, 5, 7, 2), (40, 33, 5, 5), (70_001,)]

    def run(backend: str) -> list[Tensor]:
        emas = []
        with manpp_kernels.use_backend(backend):
            for dtype in LOW:
                for layout in LAYOUTS:
                    ema = [Sample(s, dtype, layout, seed=i, device=other.device) for i, s in enumerate(shapes)]
                    params = [
                        Sample(s, (torch.float32, torch.float64)[i % 2], seed=99 + i, device=other.device)
                        for i, s in enumerate(shapes)
                    ]
                    torch.manual_seed(21)
                    # Momentum 0, or powers of two: no backend rounds before the stochastic rounding, so all of them
                    # round the very same float32.
                    for momentum in (0.0, 0.5):
                        ema_scale_update(
                            [s.view for s in ema], [s.view for s in params], momentum, rounding="stochastic"
                        )
                    assert all(s.surroundings_untouched() for s in ema)
                    emas += [s.view for s in ema]
        return emas

    for a, b in zip(run(other.backend), run("eager"), strict=True):
        assert torch.equal(a, b)
