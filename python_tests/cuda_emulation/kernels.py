"""What only the CUDA kernels have: their tables, specialisations, launches, and blocks that run in any order.

Collected where they are emulated (see test_cuda_emulation.py). The operators' own tests run there too.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from reference import Sample, assert_effective_weights, assert_ema_step
from torch import Tensor

import manpp_kernels
from manpp_kernels import EmaPlan, detach_copy, ema_scale_update, scale_bias_mix

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EMULATION = ctypes.CDLL(os.environ["MANPP_EMULATED"])
EMULATION.manpp_emulated_launches.restype = ctypes.c_char_p
EMULATION.manpp_emulated_counters.restype = ctypes.c_uint64

CHUNK = 4096  # csrc/cuda/chunks.cuh, as are the capacities: of a short table, and without and with effective weights
FEW, CAPACITY, CAPACITY_WITH_WEIGHTS = 128, 1216, 704
GROUPS = 256  # csrc/cuda/ema_scale_update_backward.cu: of one launch
COUNTERS, OWNERS = 1024, 256  # csrc/cuda/reduce.cuh and arrivals.cu: of one launch, and who may have so many
SIZES = (1, 4, 16, 64, 256, COUNTERS)  # which launches of one owner share
# (ema, params, bias) that there are kernels for, and some that go to the kernel for any mix.
SPECIALISED = [
    (F32, F32, F32),
    (BF16, F32, F32),
    (F32, BF16, BF16),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (F32, F16, F16),
]
OTHERS = [(F64, F64, F64), (F16, F32, F32), (BF16, F64, F16), (F32, F32, BF16)]


def launches() -> list[str]:
    names = EMULATION.manpp_emulated_launches().decode()
    return names.split(",") if names else []


def current_stream(stream: int = 0, capture: int = 0) -> None:
    """What the emulation says of the current stream: its number, and that of the capture it is in, if any."""
    EMULATION.manpp_emulate_stream(ctypes.c_uint64(stream), ctypes.c_uint64(capture))


def counters(count: int = COUNTERS) -> int:
    """Where the current stream's counters of arrivals are (0 where each launch gets its own); all have to be 0."""
    zeros = ctypes.c_uint32()
    address = EMULATION.manpp_emulated_counters(ctypes.c_uint32(count), ctypes.byref(zeros))
    assert zeros.value == count
    return address


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with manpp_kernels.use_backend("cpu"):
        launches()
        yield
    for size in SIZES:
        counters(size)


@pytest.fixture
def capture() -> Iterator[None]:
    """As if a CUDA graph were being captured."""
    current_stream(capture=1)
    yield
    current_stream()


def random(shape: tuple[int, ...] | int, dtype: torch.dtype, seed: int) -> Tensor:
    return Sample(shape if isinstance(shape, tuple) else (shape,), dtype, seed=seed).view


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


# ------------------------------------------------------------------------------------------ ema_scale_update


@pytest.mark.parametrize("misaligned", [(), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("dtypes", SPECIALISED + OTHERS, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_every_kernel(dtypes: tuple[torch.dtype, ...], misaligned: tuple[int, ...]) -> None:
    sizes = (0, 7, CHUNK - 1, CHUNK, 2 * CHUNK + 1021)
    for weights in (False, True):
        samples = [
            [
                Sample((n,), t, "misaligned" if j in misaligned else "contiguous", seed=10 * i + j)
                for i, n in enumerate(sizes)
            ]
            for j, t in enumerate(dtypes)
        ]
        ema, params, bias = ([s.view for s in row] for row in samples)
        before = [e.clone() for e in ema]
        groups = [i % 3 for i in range(len(sizes))]
        scale = torch.tensor([0.25, 1.5, -0.75])
        if weights:
            out = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=groups)
            assert_effective_weights(out, ema, bias, [float(scale[g]) for g in groups], 2.0)
        else:
            ema_scale_update(ema, params, 0.9)
        assert launches() == ["ema_scale_update"]
        if F64 not in dtypes or weights is False:
            assert_ema_step(ema, before, params, 0.9)
        assert all(s.surroundings_untouched() for row in samples for s in row)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32)], ids=str)
def test_around_the_capacities_of_tables(dtypes: tuple[torch.dtype, ...], weights: bool) -> None:
    capacity = CAPACITY_WITH_WEIGHTS if weights else CAPACITY
    for count in (FEW, FEW + 1, capacity, 2 * capacity + 1):
        # Every seventh is empty, some have several chunks, and every number is a table's first or last somewhere.
        sizes = [0 if i % 7 == 2 else 9000 if i % 501 == 0 else 1 + i % 5 for i in range(count)]
        ema = [random(n, dtypes[0], i) for i, n in enumerate(sizes)]
        params = [random(n, dtypes[1], i + 7) for i, n in enumerate(sizes)]
        before = [e.clone() for e in ema]
        if weights:
            bias = [random(n, dtypes[1], i + 9) for i, n in enumerate(sizes)]
            groups = [i * 5 % count % 37 for i in range(count)]
            scale = torch.linspace(0.0, 2.0, 37)
            out = ema_scale_update(ema, params, 0.75, scale=scale, bias=bias, groups=groups)
            assert_effective_weights(out, ema, bias, [float(scale[g]) for g in groups], 2.0)
        else:
            ema_scale_update(ema, params, 0.75)
        assert_ema_step(ema, before, params, 0.75)
        tables = 0 if count <= capacity else -(-count // capacity)
        assert launches() == ["write_chunks"] * tables + ["ema_scale_update"]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("params_dtype", [F32, BF16, F16, F64], ids=str)
def test_stochastic_rounding_has_eager_bits(dtype: torch.dtype, params_dtype: torch.dtype) -> None:
    # Tensors past a table's capacity, and chunks past the first, draw what their numbers say. A momentum of 1/2 keeps
    # every product exact, so that no backend may differ by a fused multiply-add.
    sizes = [3] * (CAPACITY + 5) + [2 * CHUNK + 77, 5]
    ema = [random(n, dtype, i) for i, n in enumerate(sizes)]
    params = [random(n, params_dtype, i + 3) for i, n in enumerate(sizes)]
    expected = [e.clone() for e in ema]
    torch.manual_seed(5)
    ema_scale_update(ema, params, 0.5, rounding="stochastic")
    torch.manual_seed(5)
    with manpp_kernels.use_backend("eager"):
        ema_scale_update(expected, params, 0.5, rounding="stochastic")
    assert all(same_bits(a, b) for a, b in zip(ema, expected, strict=True))


def test_no_work_launches_nothing() -> None:
    ema_scale_update([torch.empty(0)], [torch.empty(0)], 0.5)
    scale_bias_mix(torch.empty(0, 3), torch.empty(0, 3), torch.ones(()))
    detach_copy(torch.empty(0), dtype=BF16)
    assert launches() == []


def effective_weights_backward(
    sizes: list[int], groups: list[int], scale: Tensor, dtype: torch.dtype, runs: int = 3
) -> list[str]:
    """Checks the gradients of ``scale`` and bias, whose bits no order of blocks may change; returns the launches."""
    count = len(sizes)
    ema, params, bias, grads = ([random(n, dtype, i + j) for i, n in enumerate(sizes)] for j in range(4))
    bias = [b.requires_grad_() for b in bias]
    results = []
    for _ in range(runs):  # blocks and threads run in another order each time
        s = scale.clone().requires_grad_()
        out = ema_scale_update([e.clone() for e in ema], params, 0.5, scale=s, bias=bias, groups=groups)
        launches()
        results.append(torch.autograd.grad(out, [s, *bias], grads))
        names = launches()
    for again in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], again, strict=True))
    exact = torch.zeros(scale.numel(), dtype=F64)
    magnitude = torch.zeros_like(exact)
    for i in range(count):
        updated = (0.5 * ema[i].double() + 0.5 * params[i].double()).to(dtype).double()
        terms = grads[i].double() * (bias[i].detach().double() - updated)
        exact[groups[i]] += terms.sum()
        magnitude[groups[i]] += terms.abs().sum()
    assert ((results[0][0].reshape(-1).double() - exact).abs() <= 1e-5 * magnitude).all()
    for got, g, group in zip(results[0][1:], grads, groups, strict=True):
        torch.testing.assert_close(got, (float(scale.reshape(-1)[group]) * g.double()).to(dtype))
    return names


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("count", [5, FEW, FEW + 1, CAPACITY_WITH_WEIGHTS + 3])
def test_backward_over_many_tensors(dtype: torch.dtype, count: int) -> None:
    sizes = [0 if i % 11 == 4 else 3 * CHUNK + 5 if i % 499 == 0 else 1 + i % 6 for i in range(count)]
    scale = torch.tensor([0.25, 1.5, -0.75, 1.0, 2.0])
    tables = 0 if count <= CAPACITY_WITH_WEIGHTS else -(-count // CAPACITY_WITH_WEIGHTS)
    names = effective_weights_backward(sizes, [i * 3 % 5 for i in range(count)], scale, dtype)
    assert names == ["write_chunks"] * tables + ["ema_scale_update_backward"]


def test_backward_of_one_group_with_more_shares_than_threads() -> None:
    scale = torch.tensor(0.75)
    assert effective_weights_backward([300 * CHUNK + 1], [0], scale, BF16) == ["ema_scale_update_backward"]


@pytest.mark.parametrize("groups", [16, GROUPS, GROUPS + 2, 3 * GROUPS])
def test_backward_of_many_groups(groups: int) -> None:
    # In no order; a third of the groups has no elements, and some have no tensors: their sums are 0.
    scale = torch.linspace(-1, 2, groups)
    numbers = [i * 7 % groups for i in range(2 * groups) if i * 7 % groups % 5]
    sizes = [0 if g % 3 == 0 else CHUNK + 1 if g % 16 == 1 else 1 + i % 5 for i, g in enumerate(numbers)]
    names = effective_weights_backward(sizes, numbers, scale, F32)
    assert names == ["ema_scale_update_backward"] * -(-groups // GROUPS)


def test_backward_without_elements() -> None:
    assert effective_weights_backward([0, 0], [1, 0], torch.ones(3), F32) == []


def test_a_stream_and_a_capture_have_counters_of_their_own() -> None:
    default = counters()
    owners = [(stream, capture) for stream in (1, 2) for capture in (0, 7, 8)]
    found = {}
    for owner in owners:
        current_stream(*owner)
        found[owner] = counters()
    assert len({default, *found.values()}) == 1 + len(owners)
    assert all(abs(a - b) >= 4 * COUNTERS for a, b in itertools.combinations([default, *found.values()], 2))
    current_stream(1)
    places = sorted((counters(size), size) for size in SIZES)
    assert all(a + 4 * size <= b for (a, size), (b, _) in itertools.pairwise(places))
    assert counters(3) == counters(4)
    for owner in owners:  # for good
        current_stream(*owner)
        assert counters() == found[owner]
    # Graphs do not end as far as anyone can tell: at last their launches get counters that are cleared before each.
    # Of those that sum up one number, as a layer's scale, there may be thousands.
    for capture in range(100, 100 + 10 * OWNERS):
        current_stream(1, capture)
        assert counters(1) != 0
    more = itertools.count(100 + 10 * OWNERS)
    for size in reversed(SIZES):
        address = 1
        while address != 0:
            current_stream(1, next(more))
            address = counters(size)
    assert next(more) < 100 + 12 * OWNERS
    assert effective_weights_backward([3 * CHUNK, 5], [1, 0], torch.ones(2), F32) == ["ema_scale_update_backward"]
    scale = torch.ones(3, requires_grad=True)
    scale_bias_mix(torch.ones(2, 3, 80, 80), torch.zeros(2, 3, 80, 80), scale).sum().backward()
    assert torch.equal(scale.grad, torch.full((3,), 12800.0))
    current_stream(1)
    assert counters() == found[1, 0]
    current_stream()
    assert counters() == default


# -------------------------------------------------------------------------------------------------- EmaPlan


@pytest.mark.parametrize("weights", [False, True])
def test_a_plan_updates_in_one_launch(weights: bool) -> None:
    count = CAPACITY + 1
    # The first is empty: its entry says nothing of the others.
    ema, params, bias = ([random(i % 10, F32, 3 * i + j) for i in range(count)] for j in range(3))
    scale = torch.tensor(0.5) if weights else None
    plan = EmaPlan(ema, params, bias=bias if weights else None)
    plan.update(0.5, scale)
    assert launches()[-1] == "ema_scale_update"
    for momentum in (0.9, torch.tensor(0.25)):
        before = [e.clone() for e in ema]
        plan.update(momentum, scale)
        assert launches() == ["ema_scale_update"]
        assert_ema_step(ema, before, params, float(momentum))
    if weights:
        assert_effective_weights(plan.weights, ema, bias, [0.5] * count, 2.0)


@pytest.mark.usefixtures("capture")
def test_a_plan_built_inside_a_capture() -> None:
    ema, params = [random(10, F32, 0)], [random(10, F32, 1)]
    plan = EmaPlan(ema, params)
    plan.update(0.5)
    plan.update(0.5)  # of another graph, perhaps the first to run
    assert launches() == ["write_chunks", "ema_scale_update"] * 2
    current_stream()
    before = [e.clone() for e in ema]
    plan.update(0.5)
    plan.update(0.5)
    assert launches() == ["write_chunks", "ema_scale_update", "ema_scale_update"]
    assert_ema_step([(e + p) / 2 for e, p in zip(before, params, strict=True)], before, params, 0.5)
    current_stream(capture=1)
    plan.update(0.5)
    assert launches() == ["ema_scale_update"]


@pytest.mark.usefixtures("capture")
def test_nothing_is_waited_for_inside_a_capture() -> None:
    count = CAPACITY + 1
    ema_scale_update([torch.ones(2) for _ in range(count)], [torch.ones(2) for _ in range(count)], 0.5)
    a, b = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    scale = torch.ones(3, requires_grad=True)
    scale_bias_mix(a, b, scale).sum().backward()
    detach_copy(a, memory_format=torch.channels_last, dtype=BF16)


# ------------------------------------------------------------------------- scale_bias_mix and detach_copy


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned", "transposed"])
def test_mix_does_not_depend_on_the_order_of_threads(dtype: torch.dtype, layout: str) -> None:
    # Rows, pixels and neither, in whole vectors and not; one block of a sum and several, some of them without work.
    shapes = [(3, 16, 8, 8), (2, 5, 7, 7), (2, 64, 3, 3), (2, 3, 40, 60), (70, 9, 1, 1), (2, 40, 16, 16), (150, 8, 2)]
    for shape, per_channel in itertools.product(shapes, (False, True)):
        results = []
        for _ in range(3):
            lb, ema = (Sample(shape, dtype, layout, seed=i).view.requires_grad_() for i in range(2))
            scale = random(shape[1], F32, 2) if per_channel else torch.tensor(0.75)
            scale.requires_grad_()
            launches()
            out = scale_bias_mix(lb, ema, scale)
            assert launches() == ["scale_bias_mix"]
            grad = Sample(shape, dtype, layout, seed=5).view
            results.append([out, *torch.autograd.grad(out, (lb, ema, scale), grad)])
            assert launches() == ["scale_bias_mix_backward"]
        for again in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], again, strict=True)), (shape, per_channel)
        with manpp_kernels.use_backend("eager"):
            torch.testing.assert_close(results[0][0], scale_bias_mix(lb, ema, scale))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "per_channel"),
    [
        ((2, 1, 1100, 1000), False),  # more segments than blocks of a launch
        ((1, 700, 9, 8), True),  # more sums than blocks, and than counters
        ((300, 520, 2), True),
        ((40, 300, 8, 4), True),  # three blocks a sum
        ((90, 64, 12, 12), True),
        ((60, 3, 40, 40), True),
    ],
    ids=str,
)
def test_gradient_of_a_mix_scale(shape: tuple[int, ...], per_channel: bool, layout: str) -> None:
    lb, ema, grad = (Sample(shape, BF16, layout, seed=i).view for i in range(3))
    results = []
    for _ in range(2):
        scale = torch.ones(shape[1] if per_channel else (), requires_grad=True)
        out = scale_bias_mix(lb, ema, scale)
        launches()
        results += torch.autograd.grad(out, scale, grad)
        assert launches() == ["scale_bias_mix_backward"]
    assert same_bits(*results)
    terms = grad.double() * (lb.double() - ema.double())
    dims = [d for d in range(lb.dim()) if d != 1 or not per_channel]
    exact, magnitude = terms.sum(dims), terms.abs().sum(dims)
    assert ((results[0].double() - exact.reshape(scale.shape)).abs() <= 1e-6 * magnitude).all()


@pytest.mark.parametrize(("source", "result"), list(itertools.product((F32, BF16, F16), repeat=2)), ids=str)
def test_copies_have_the_bits_of_copy(source: torch.dtype, result: torch.dtype) -> None:
    # Square tiles, whole and not, and those for few rows or columns.
    for shape in ((2, 3, 65, 63), (1, 130, 2, 70), (3, 64, 8, 8), (2, 5, 4), (2, 16, 32, 32), (1, 33, 20, 21)):
        for layouts in itertools.permutations(("contiguous", "channels_last"), 2):
            x, out = Sample(shape, source, layouts[0], seed=1), Sample(shape, result, layouts[1], seed=2)
            detach_copy(x.view, out.view)
            assert same_bits(out.view, x.view.to(result))
            assert launches() == ["detach_copy"]
    for n in (1, 1023, 8 * 1024, 8 * 1024 + 1, 3 * 8 * 1024 + 5):
        x, out = Sample((n,), source, "misaligned", seed=1), Sample((n,), result, "contiguous", seed=2)
        detach_copy(x.view, out.view)
        assert same_bits(out.view, x.view.to(result))


# --------------------------------------------------------------------------------------------- the emulation


def test_it_finds_an_access_out_of_bounds() -> None:
    """Run alone, by test_cuda_emulation.py: it ends the process."""
    if os.environ.get("MANPP_EMULATION_CRASH") != "1":
        pytest.skip("ends the process; run by test_cuda_emulation.py")
    param = torch.ones(CHUNK)
    param.untyped_storage().resize_(4 * CHUNK - 16)  # one vector too short
    torch.ops.manpp_kernels.ema_scale_update([torch.ones(CHUNK)], [param], 0.5, None, None, [], [], 2.0, None, [])
