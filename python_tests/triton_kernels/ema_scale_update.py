"""ema_scale_update in Triton against the eager backend: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import manpp_kernels
from manpp_kernels.backends import eager, triton_interpreted
from manpp_kernels.backends.triton import ema_scale_update_backward, tables
from manpp_kernels.backends.triton.ema_scale_update import CHUNK, build_table, launch

DEVICE = "cpu" if triton_interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 7, 8, 9, 31, CHUNK, CHUNK + 1, 2 * CHUNK + 1009]


def tensors(sizes: list[int], dtypes: list[torch.dtype], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(d).to(DEVICE)
        for n, d in zip(sizes, dtypes, strict=True)
    ]


def copies(xs: list[Tensor]) -> list[Tensor]:
    """Clones that keep strides, holes between the elements included."""
    return [x.new_empty(0).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride()) for x in xs]


def same(x: Tensor, y: Tensor) -> bool:
    """Equal to the bit, but that every NaN is as good as another."""
    inf = float("inf")
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0, inf, -inf), y.nan_to_num(0, inf, -inf))


def both(ema: list[Tensor], params: list[Tensor], momentum: float | Tensor, **kwargs: object) -> None:
    """Run the operator on Triton and on eager from one random state; every bit has to agree."""
    mine, theirs = ema, copies(ema)
    results = []
    for backend, e in (("triton", mine), ("eager", theirs)):
        torch.manual_seed(5)
        with manpp_kernels.use_backend(backend):
            results.append((manpp_kernels.ema_scale_update(e, params, momentum, **kwargs) or [], e))
    for name, xs, ys in (("w", results[0][0], results[1][0]), ("ema", mine, theirs)):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            assert same(x.detach(), y.detach()), f"{name}[{i}] {x.dtype} {tuple(x.shape)}"
            assert x.stride() == y.stride()


@pytest.mark.parametrize(("ema", "params"), list(itertools.product(DTYPES, DTYPES)))
def test_update_agrees_to_the_bit(ema: torch.dtype, params: torch.dtype) -> None:
    n = len(SIZES)
    both(tensors(SIZES, [ema] * n), tensors(SIZES, [params] * n, 1), 0.995)


@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("ema", DTYPES)
def test_effective_weights_agree_to_the_bit(ema: torch.dtype, bias: torch.dtype) -> None:
    n = len(SIZES)
    scale = torch.tensor([0.75, 1.25, -0.5], device=DEVICE)
    groups = [i % 3 for i in range(n)]
    b = tensors(SIZES, [bias] * n, 2)
    both(tensors(SIZES, [ema] * n), tensors(SIZES, [ema] * n, 1), 0.9, scale=scale, bias=b, groups=groups, total=1.3)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lists_of_mixed_dtypes(rounding: str) -> None:
    combinations = list(itertools.product(DTYPES, DTYPES[:2], [torch.bfloat16, torch.float64, torch.float32]))
    sizes = [SIZES[i % 6] for i in range(len(combinations))]
    ema, params, bias = (tensors(sizes, list(d), s) for s, d in enumerate(zip(*combinations, strict=True)))
    both(ema, params, 0.99, scale=torch.tensor(0.5, device=DEVICE), bias=bias, rounding=rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_stochastic_rounding_agrees_to_the_bit(dtype: torch.dtype) -> None:
    n = len(SIZES)
    params = tensors(SIZES, [torch.float32] * n, 1)
    params[-1][:40] = torch.linspace(-6e-5, 6e-5, 40)  # where float16 is subnormal
    params[-1][40:50] = torch.tensor([float("inf"), float("-inf"), float("nan"), 65504, 65519, 65521, 3e38, -0.0, 0, 1])
    both(tensors(SIZES, [dtype] * n), params, 0.5, rounding="stochastic")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_special_values_round_to_nearest_alike() -> None:
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65520.0, 3.39e38, 1e-40, 6e-8, 2.9e-8]
    for dtype in DTYPES:
        params = torch.tensor(values, dtype=torch.float32, device=DEVICE)
        mine, theirs = (torch.zeros(len(values), dtype=dtype, device=DEVICE) for _ in range(2))
        for backend, e in (("triton", mine), ("eager", theirs)):
            with manpp_kernels.use_backend(backend):
                manpp_kernels.ema_scale_update(e, params, 0.0)
        assert same(mine, theirs), dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_as_a_tensor(dtype: torch.dtype) -> None:
    sizes = [5, 100]
    momentum = torch.tensor(0.997, dtype=dtype, device=DEVICE)
    for d in (torch.float32, torch.float64):
        both(tensors(sizes, [d] * 2), tensors(sizes, [d] * 2, 1), momentum)


def test_many_tensors_and_nothing() -> None:
    sizes = [(i * 7) % 23 for i in range(60)]
    both(tensors(sizes, [torch.float32] * 60), tensors(sizes, [torch.float32] * 60, 1), 0.9)
    both([], [], 0.9)
    both(tensors([0, 0], [torch.float32] * 2), tensors([0, 0], [torch.float32] * 2), 0.9)


def test_misaligned_views() -> None:
    """Among aligned tensors, on their own, and misaligned by each operand in turn."""
    base = tensors([CHUNK + 40], [torch.float32])[0]
    whole = base[: CHUNK + 16]
    for shift in ((1, 0, 0), (0, 3, 0), (0, 0, 2), (1, 1, 1)):
        ema, params, bias = (base.clone()[s : s + CHUNK + 16] for s in shift)
        scale = torch.tensor(0.5, device=DEVICE)
        both([ema, whole.clone()], [params, whole.clone()], 0.9, scale=scale, bias=[bias, whole.clone()])
        both([ema], [params], 0.9)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_layouts(rounding: str) -> None:
    shape = (2, 3, 4, 5)

    def make(layout: str, seed: int) -> Tensor:
        x = tensors([120], [torch.bfloat16], seed)[0].view(shape)
        return {
            "contiguous": lambda: x,
            "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
            "permuted": lambda: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
            "with holes": lambda: torch.stack([x, x], -1)[..., 0],
        }[layout]()

    layouts = ["contiguous", "channels_last", "permuted", "with holes"]
    for e, p, b in itertools.product(layouts, repeat=3):
        scale = torch.tensor(0.5, device=DEVICE)
        both([make(e, 0)], [make(p, 1)], 0.9, scale=scale, bias=[make(b, 2)], rounding=rounding)
    expanded = torch.randn(3, 1, 1, device=DEVICE).expand(shape)
    both([make("channels_last", 0)], [expanded], 0.9)


def test_a_table_is_built_once_and_launched_often() -> None:
    sizes = [5, CHUNK + 3]
    ema, params = tensors(sizes, [torch.float32] * 2), tensors(sizes, [torch.float32] * 2, 1)
    wanted = copies(ema)
    table = build_table(ema, params, [], [], [])
    for step in range(3):
        for p in params:
            p.add_(1)
        launch(table, 0.5 + step / 10, None, None, 2.0, None)
        eager.ema_scale_update(wanted, params, 0.5 + step / 10, None, None, [], [], 2.0, None, [])
    assert all(torch.equal(a, b) for a, b in zip(ema, wanted, strict=True))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), *[st.sampled_from(DTYPES)] * 3), max_size=5),
    st.floats(0, 1),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_any_list(rows: list[tuple], momentum: float, rounding: str) -> None:
    sizes = [row[0] for row in rows]
    ema, params, bias = (tensors(sizes, [row[k] for row in rows], k) for k in (1, 2, 3))
    both(ema, params, momentum, scale=torch.tensor(1.5, device=DEVICE), bias=bias, rounding=rounding)


@pytest.mark.parametrize("dtypes", [*([d] for d in DTYPES), DTYPES], ids=str)
def test_backward(dtypes: list[torch.dtype]) -> None:
    """Gradients of every bias, and the sums by group, among them one group that no tensor has."""
    sizes = SIZES
    n = len(sizes)
    kinds = [dtypes[i % len(dtypes)] for i in range(n)]
    grad, bias, ema = (tensors(sizes, kinds, s) for s in range(3))
    groups = [(i * 5) % 4 for i in range(n)]
    scale = torch.tensor([0.5, 1.5, -1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    for need_bias, need_scale in ((True, True), (True, False), (False, True)):
        outs = []
        for function in (ema_scale_update_backward, eager.ema_scale_update_backward):
            grad_bias = [torch.full_like(b, 9) for b in bias] if need_bias else []
            grad_scale = torch.full_like(scale, 9) if need_scale else None
            known = need_scale or function is not ema_scale_update_backward  # Triton has no need of them then
            function(grad, bias if known else [], ema if known else [], scale, groups, 2.0, grad_bias, grad_scale)
            outs.append((grad_bias, grad_scale))
        assert all(torch.equal(a, b) for a, b in zip(outs[0][0], outs[1][0], strict=True))
        if need_scale:
            rtol = 1e-12 if dtypes == [torch.float64] else 1e-5
            torch.testing.assert_close(outs[0][1], outs[1][1], rtol=rtol, atol=rtol * 100)


def test_backward_without_elements() -> None:
    empty, scale = torch.zeros(0, device=DEVICE), torch.ones((), device=DEVICE)
    grad_scale = torch.full_like(scale, 9)
    ema_scale_update_backward([empty], [empty], [empty], scale, [], 2.0, [empty.clone()], grad_scale)
    assert grad_scale.item() == 0.0


def test_backward_of_several_rounds_leaves_its_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[ema_scale_update_backward.__module__]  # the function stands in the package under its name
    monkeypatch.setattr(module, "MOST_PARTIALS", 2)
    built: list[tables.Table] = []
    monkeypatch.setattr(module, "build", lambda *a: built.append(tables.build(*a)) or built[-1])
    grad, bias, ema = (tensors([5 * CHUNK + 3, CHUNK], [torch.float32] * 2, s) for s in range(3))
    scale, grad_scale = torch.ones(2, device=DEVICE), torch.empty(2, device=DEVICE)
    module.ema_scale_update_backward(grad, bias, ema, scale, [1, 0], 2.0, [], grad_scale)
    shares = [(g.double() * (b.double() - e.double())).sum() for g, b, e in zip(grad, bias, ema, strict=True)]
    torch.testing.assert_close(grad_scale.double(), torch.stack(shares).flip(0), rtol=1e-5, atol=1e-4)
    assert built[0].programs == 3
    assert not built[0].counters.any()


def test_gradcheck() -> None:
    ema, params = tensors([3, 4], [torch.float64] * 2), tensors([3, 4], [torch.float64] * 2, 1)
    bias = [b.requires_grad_() for b in tensors([3, 4], [torch.float64] * 2, 2)]
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64, device=DEVICE, requires_grad=True)

    def weights(scale: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        fresh = [e.clone() for e in ema]
        out = manpp_kernels.ema_scale_update(fresh, params, 0.9, scale=scale, bias=bias, groups=[1, 0])
        return tuple(out)

    with manpp_kernels.use_backend("triton"):
        assert torch.autograd.gradcheck(weights, (scale, *bias))
        # Gradients that come expanded, as that of a sum does, and for one of the outputs only.
        weights(scale, *bias)[1].sum().backward()
    assert torch.equal(bias[1].grad, torch.full_like(bias[1], 0.5))
    assert bias[0].grad is None or not bias[0].grad.any()
