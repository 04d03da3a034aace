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

CHUNK = 4096  # csrc/cuda/chunks.cuh, as are the capacities of a table without and with effective weights
CAPACITY, CAPACITY_WITH_WEIGHTS = 1216, 704
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


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with manpp_kernels.use_backend("cpu"):
        launches()
        yield


@pytest.fixture
def capture() -> Iterator[None]:
    """As if a CUDA graph were being captured."""
    EMULATION.manpp_emulate_capture(1)
    yield
    EMULATION.manpp_emulate_capture(0)


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
def test_around_the_capacity_of_a_table(dtypes: tuple[torch.dtype, ...], weights: bool) -> None:
    capacity = CAPACITY_WITH_WEIGHTS if weights else CAPACITY
    for count in (capacity, 2 * capacity + 1):
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


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("count", [5, CAPACITY_WITH_WEIGHTS + 3])
def test_backward_over_many_tensors(dtype: torch.dtype, count: int) -> None:
    sizes = [0 if i % 11 == 4 else 3 * CHUNK + 5 if i % 499 == 0 else 1 + i % 6 for i in range(count)]
    ema = [random(n, dtype, i) for i, n in enumerate(sizes)]
    params = [random(n, dtype, i + 1) for i, n in enumerate(sizes)]
    bias = [random(n, dtype, i + 2).requires_grad_() for i, n in enumerate(sizes)]
    grads = [random(n, dtype, i + 3) for i, n in enumerate(sizes)]
    groups = [i * 3 % 5 for i in range(count)]
    results = []
    for _ in range(3):  # blocks and threads run in another order each time
        scale = torch.tensor([0.25, 1.5, -0.75, 1.0, 2.0], requires_grad=True)
        launches()
        out = ema_scale_update([e.clone() for e in ema], params, 0.5, scale=scale, bias=bias, groups=groups)
        launches()
        results.append(torch.autograd.grad(out, [scale, *bias], grads))
        tables = 0 if count <= CAPACITY_WITH_WEIGHTS else -(-count // CAPACITY_WITH_WEIGHTS)
        assert launches() == ["write_chunks"] * tables + ["ema_scale_update_backward", "sum_shares"]
    for again in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], again, strict=True))
    exact = torch.zeros(5, dtype=F64)
    magnitude = torch.zeros(5, dtype=F64)
    for g, b, e, p, group in zip(grads, bias, ema, params, groups, strict=True):
        updated = (0.5 * e.double() + 0.5 * p.double()).to(dtype).double()
        terms = g.double() * (b.detach().double() - updated)
        exact[group] += terms.sum()
        magnitude[group] += terms.abs().sum()
    assert ((results[0][0].double() - exact).abs() <= 1e-5 * magnitude).all()
    for got, g, group in zip(results[0][1:], grads, groups, strict=True):
        torch.testing.assert_close(got, (float([0.25, 1.5, -0.75, 1.0, 2.0][group]) * g.double()).to(dtype))


# -------------------------------------------------------------------------------------------------- EmaPlan


@pytest.mark.parametrize("weights", [False, True])
def test_a_plan_updates_in_one_launch(weights: bool) -> None:
    count = CAPACITY + 1
    ema, params, bias = ([random(1 + i % 9, F32, 3 * i + j) for i in range(count)] for j in range(3))
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
    EMULATION.manpp_emulate_capture(0)
    before = [e.clone() for e in ema]
    plan.update(0.5)
    plan.update(0.5)
    assert launches() == ["write_chunks", "ema_scale_update", "ema_scale_update"]
    assert_ema_step([(e + p) / 2 for e, p in zip(before, params, strict=True)], before, params, 0.5)
    EMULATION.manpp_emulate_capture(1)
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
    # Rows, pixels and neither, in whole vectors and not; several segments of a row, several blocks of pixels.
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
            assert launches() == ["scale_bias_mix_backward", "sum_shares"]
        for again in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], again, strict=True)), (shape, per_channel)
        with manpp_kernels.use_backend("eager"):
            torch.testing.assert_close(results[0][0], scale_bias_mix(lb, ema, scale))


@pytest.mark.parametrize(("source", "result"), list(itertools.product((F32, BF16, F16), repeat=2)), ids=str)
def test_copies_have_the_bits_of_copy(source: torch.dtype, result: torch.dtype) -> None:
    for shape in ((2, 3, 65, 63), (1, 130, 2, 70), (3, 64, 8, 8), (2, 5, 4)):
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
