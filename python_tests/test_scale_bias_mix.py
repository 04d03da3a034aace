"""``scale_bias_mix``: values, gradients, what it keeps for backward, and its errors."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import misuse
import numpy as np
import pytest
import torch
from conftest import BACKENDS_ON_CPU, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    CHUNK_SIZES,
    DTYPES,
    LAYOUTS,
    SIZES,
    Sample,
    arithmetic_dtype,
    assert_close,
    count,
    mix,
    mix_gradients,
    not_contiguous,
    sum_ops,
)
from torch import Tensor

from manpp_kernels import scale_bias_mix

SHAPES = [(), (5,), (3, 7), (2, 3, 5), (2, 9, 3, 3), (4, 17, 5, 7), (2, 4, 3, 2, 3), (0, 3), (2, 0, 3)]


def check(lb: Tensor, ema: Tensor, scale: Tensor, total: float = 2.0, grad_layout: str = "contiguous") -> None:
    """Forward and backward against the oracle. The maps have the same dtype."""
    lb, ema, scale = (t.detach().requires_grad_() for t in (lb, ema, scale))
    arithmetic = arithmetic_dtype(lb)
    out = scale_bias_mix(lb, ema, scale, total=total)
    assert out.dtype == lb.dtype
    exact, magnitude = mix(lb, ema, scale, total)
    # A scale of a wider dtype is rounded to the arithmetic's; then total - scale, the product, the sum; the oracle's.
    assert_close(out, exact, magnitude, ops=8, arithmetic=arithmetic, what="mix")
    grad = Sample(out.shape, out.dtype, grad_layout, seed=77, device=str(out.device)).view
    got = torch.autograd.grad(out, (lb, ema, scale), grad)
    terms = out.numel() / max(scale.numel(), 1)
    for name, g, t in zip(("lb_out", "ema_out", "scale"), got, (lb, ema, scale), strict=True):
        assert (g.dtype, g.shape) == (t.dtype, t.shape), name
        exact, magnitude = mix_gradients(grad, lb, ema, scale, total)[name]
        ops = sum_ops(int(terms)) if name == "scale" else 6
        assert_close(g, exact, magnitude, ops=ops, arithmetic=arithmetic, what=f"grad of {name}")


def maps(
    shape: Any, dtype: torch.dtype, device: str, layouts: tuple[str, str] = ("contiguous",) * 2
) -> tuple[Tensor, Tensor]:
    return tuple(Sample(shape, dtype, layout, seed=i, device=device).view for i, layout in enumerate(layouts))


def scales(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """A 0-dim scale, and one per channel where there are channels."""
    found = [torch.tensor(0.75, dtype=dtype, device=device)]
    if len(shape) >= 2:
        found.append(Sample((shape[1],), dtype, "misaligned", seed=5, device=device).view)
    return found


@pytest.mark.parametrize(("dtype", "scale_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_dtype_and_shape(target: Target, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for scale in scales(shape, scale_dtype, target.device):
            check(*maps(shape, dtype, target.device), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(target: Target, dtype: torch.dtype) -> None:
    scale = torch.tensor(1.25, device=target.device)
    for n in SIZES + CHUNK_SIZES:
        check(*maps((n,), dtype, target.device), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 9, 16, 17, 64, 65, 600, 1030])
def test_channels_around_vector_widths(target: Target, dtype: torch.dtype, channels: int) -> None:
    for layout in ("contiguous", "channels_last"):
        for rest in [(1, 1), (3, 5), (8, 8)]:
            lb, ema = maps((3, channels, *rest), dtype, target.device, (layout, layout))
            for scale in scales(tuple(lb.shape), torch.float32, target.device):
                check(lb, ema, scale, grad_layout=layout)


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("lb_layout", "ema_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_pair_of_layouts(target: Target, lb_layout: str, ema_layout: str, grad_layout: str) -> None:
    for shape in [(3, 5, 4, 3), (4, 9)]:
        for scale in scales(shape, torch.float32, target.device):
            check(*maps(shape, torch.float32, target.device, (lb_layout, ema_layout)), scale, grad_layout=grad_layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_scale_that_is_not_contiguous(target: Target, layout: str) -> None:
    lb, ema = maps((3, 5, 4, 3), torch.float32, target.device, (layout, layout))
    scale = torch.rand(5, device=target.device) + 0.5
    for view in (not_contiguous(scale), scale[:1].expand(5)):
        assert not view.is_contiguous()
        check(lb, ema, view, grad_layout=layout)


def test_a_scale_of_one_entry_is_a_scalar(target: Target) -> None:
    lb, ema = maps((3, 5, 4), torch.float32, target.device)
    scale = torch.tensor([0.75], device=target.device, requires_grad=True)
    out = scale_bias_mix(lb, ema, scale)
    assert torch.equal(out, scale_bias_mix(lb, ema, scale.detach()[0]))
    (got,) = torch.autograd.grad(out.sum(), scale)
    torch.testing.assert_close(got, (lb - ema).sum().reshape(1))
    # Of one channel it is the scale of that, and the same; in whatever order the elements lie, and not by a copy.
    lb, ema, grad = (t.permute(2, 0, 1).unsqueeze(1) for t in torch.randn(3, 3, 5, 4, device=target.device))
    scalar = scale.detach()[0].requires_grad_()
    (of_one,) = torch.autograd.grad(scale_bias_mix(lb, ema, scale), scale, grad)
    (of_all,) = torch.autograd.grad(scale_bias_mix(lb, ema, scalar), scalar, grad)
    assert torch.equal(of_one, of_all.reshape(1))


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_are_laid_out_like_the_gradient_that_came_in(target: Target, per_channel: bool) -> None:
    """As the fake kernel says, and with it what torch.compile generates."""
    maps, wide = torch.randn(2, 9, 3, 5, device=target.device), torch.randn(2, 12, 3, 5, device=target.device)
    grads = {
        "channel-major": maps.transpose(0, 1).contiguous().transpose(0, 1),
        "slice": wide[:, :9],
        "slice of channels_last": wide.to(memory_format=torch.channels_last)[:, :9],
        "expanded": maps[..., :1, :1].expand(2, 9, 3, 5),
    }
    scale = torch.rand((9,) if per_channel else (), device=target.device)
    for name, grad in grads.items():
        got = torch.ops.manpp_kernels.scale_bias_mix_backward(grad, maps, maps.flip(1), scale, 2.0, True, True)
        s = scale.view(-1, 1, 1) if per_channel else scale
        for g, exact in zip(got, (s * grad, (2 - s) * grad), strict=False):
            torch.testing.assert_close(g, exact)
            assert g.stride() == torch.empty_like(grad).stride(), name


def test_large_maps(target: Target) -> None:
    """Large enough for several threads or blocks, of which one has less to do."""
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.float16):
            lb, ema = maps((17, 37, 33, 31), dtype, target.device, (layout, layout))
            for scale in scales(tuple(lb.shape), torch.float32, target.device):
                check(lb, ema, scale, grad_layout=layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_too_large_for_the_caches(layout: str) -> None:
    """More than 32 MB of results, which the CPU's kernels write otherwise; rows of an odd length."""
    lb, ema, grad = torch.randn(3, 3, 65, 151, 143, dtype=torch.float64).unbind()
    if layout == "channels_last":
        lb, ema, grad = (t.contiguous(memory_format=torch.channels_last) for t in (lb, ema, grad))
    s = torch.linspace(0.5, 1.5, 65, dtype=torch.float64).view(-1, 1, 1)
    inputs = [t.requires_grad_() for t in (lb, ema, s.flatten())]
    out = scale_bias_mix(*inputs)
    torch.testing.assert_close(out, s * lb + (2 - s) * ema, rtol=1e-14, atol=1e-14)
    got = torch.autograd.grad(out, inputs, grad)
    exact = (s * grad, (2 - s) * grad, (grad * (lb - ema)).sum((0, 2, 3)))
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


def test_layout_of_the_result(target: Target) -> None:
    scale = torch.tensor(1.0, device=target.device)
    lb = torch.randn(2, 3, 4, 5, device=target.device).to(memory_format=torch.channels_last)
    out = scale_bias_mix(lb, lb.contiguous(), scale)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("which", ["lb_out", "ema_out", "scale"])
def test_storage_that_was_freed_is_an_error(target: Target, which: str) -> None:
    inputs = {name: torch.ones(2, 4, 6, device=target.device) for name in ("lb_out", "ema_out")}
    inputs["scale"] = torch.ones(4, device=target.device)
    inputs[which].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{which} has no memory: its storage was freed"):
        scale_bias_mix(**inputs)


def test_maps_of_two_dtypes_are_promoted(target: Target) -> None:
    lb, ema = torch.randn(2, 4, 6, device=target.device).unbind()
    scale = torch.tensor(0.5, device=target.device)
    out = scale_bias_mix(lb.bfloat16().requires_grad_(), ema, scale)
    assert out.dtype == torch.float32
    exact, magnitude = mix(lb.bfloat16(), ema, scale, 2.0)
    assert_close(out, exact, magnitude, ops=8, arithmetic=torch.float32, what="mix")
    both = scale_bias_mix(lb.bfloat16(), ema.half(), scale)
    assert both.dtype == torch.promote_types(torch.bfloat16, torch.float16)


@pytest.mark.parametrize("total", [2.0, 1.0, 0.0, 1.7])
def test_totals_and_special_scales(target: Target, total: float) -> None:
    for dtype in (torch.float32, torch.float64):
        lb, ema = maps((2, 4, 6), dtype, target.device)
        for value in (0.0, 1.0, 2.0, -3.5):
            check(lb, ema, torch.tensor(value, device=target.device), total)


@pytest.mark.parametrize("total", [2, np.float32(2), np.int64(2)], ids=lambda total: type(total).__name__)
def test_totals_of_other_types_of_number(target: Target, total: Any) -> None:
    lb, ema = maps((2, 4, 6), torch.float32, target.device)
    scale = torch.tensor(0.75, device=target.device)
    assert torch.equal(scale_bias_mix(lb, ema, scale, total=total), scale_bias_mix(lb, ema, scale, total=2.0))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 6), max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    total=st.sampled_from([1.0, 2.0]),
)
def test_any_maps(target: Target, shape, dtype, scale_dtype, layouts, total) -> None:
    for scale in scales(shape, scale_dtype, target.device):
        check(*maps(shape, dtype, target.device, layouts[:2]), scale, total, grad_layout=layouts[2])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_gradcheck(target: Target, wanted: tuple[bool, ...], per_channel: bool) -> None:
    lb, ema = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=target.device).unbind()
    scale = torch.randn((3,) if per_channel else (), dtype=torch.float64, device=target.device)
    inputs = tuple(t.clone().requires_grad_(w) for t, w in zip((lb, ema, scale), wanted, strict=True))
    assert torch.autograd.gradcheck(lambda *t: scale_bias_mix(*t, total=1.5), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: scale_bias_mix(*t, total=1.5), inputs)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_keeps_and_computes_no_more_than_asked_for(target: Target, wanted: tuple[bool, ...]) -> None:
    lb, ema = torch.randn(2, 8, 16, device=target.device).unbind()
    inputs = [
        t.clone().requires_grad_(w)
        for t, w in zip((lb, ema, torch.ones((), device=target.device)), wanted, strict=True)
    ]
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = scale_bias_mix(*inputs)
    elements = sum(t.numel() for t in saved)
    if wanted[2]:
        assert elements == lb.numel() + ema.numel() + 1, "the maps are needed for the gradient of scale alone"
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs}, "no copies are kept"
    else:
        assert elements <= 1
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.sum().backward()
    assert [t.grad is not None for t in inputs] == list(wanted)


def _short(out: Tensor) -> bool:
    """Whether the mix took the short way into autograd's graph."""
    return "_Mix" in type(out.grad_fn).__name__


def test_the_common_case_takes_the_short_way(target: Target) -> None:
    lb, ema = torch.randn(2, 2, 3, 4, device=target.device).unbind()
    for scale in (torch.ones((), device=target.device), torch.rand(3, device=target.device)):
        assert _short(scale_bias_mix(lb, ema, scale.requires_grad_())) == (target.backend in ("cpu", "cuda"))
        assert _short(scale_bias_mix(lb.clone().requires_grad_(), ema, scale.detach())) == (
            target.backend in ("cpu", "cuda")
        )
    with torch.no_grad():
        assert not scale_bias_mix(lb, ema, scale).requires_grad
    assert not scale_bias_mix(lb, ema, scale.detach()).requires_grad
    with torch.inference_mode():
        assert scale_bias_mix(lb, ema, scale).is_inference()


@pytest.mark.parametrize("scale_shape", [(), (3,)], ids=str)
def test_what_is_not_common_takes_the_long_way_to_the_same(target: Target, scale_shape: tuple[int, ...]) -> None:
    lb, ema = torch.randn(2, 2, 3, 4, device=target.device).unbind()
    scale = torch.rand(scale_shape, device=target.device) + 0.5
    uncommon = {
        "lb_out lazily negated": (torch._neg_view(-lb), ema, scale),
        "ema_out lazily negated": (lb, torch._neg_view(-ema), scale),
        "scale lazily negated": (lb, ema, torch._neg_view(-scale)),
        "of two dtypes": (lb.double(), ema, scale),
        "without elements": (lb[:, :, :0], ema[:, :, :0], scale),
    }
    for case, inputs in uncommon.items():
        a, b, s = (t.detach().requires_grad_() for t in inputs)
        out = scale_bias_mix(a, b, s)
        assert not _short(out), case
        torch.testing.assert_close(out, mix(a, b, s, 2.0)[0].to(out.dtype), msg=case)
        (got,) = torch.autograd.grad(out, s, torch.ones_like(out))
        exact = mix_gradients(torch.ones_like(out), a, b, s, 2.0)["scale"][0]
        torch.testing.assert_close(got, exact.to(got.dtype), msg=case)


def test_gradients_that_are_not_plain(target: Target) -> None:
    """Lazily negated, expanded, several at once: what reaches a backward pass is up to others."""
    lb, ema = torch.randn(2, 2, 3, 4, device=target.device).unbind()
    scale = torch.rand(3, device=target.device)
    inputs = [t.detach().requires_grad_() for t in (lb, ema, scale)]
    grad = torch.randn(2, 3, 4, device=target.device)
    exact = torch.autograd.grad(scale_bias_mix(*inputs), inputs, grad)
    negated = torch.autograd.grad(scale_bias_mix(*inputs), inputs, torch._neg_view(-grad))
    assert all(torch.equal(a, b) for a, b in zip(negated, exact, strict=True))
    expanded = torch.autograd.grad(scale_bias_mix(*inputs).sum(), inputs)
    ones = torch.autograd.grad(scale_bias_mix(*inputs), inputs, torch.ones_like(grad))
    for a, b in zip(expanded, ones, strict=True):
        torch.testing.assert_close(a, b)
    both = torch.stack([grad, 2 * grad])
    several = torch.autograd.grad(scale_bias_mix(*inputs), inputs, both, is_grads_batched=True)
    for batch, one in zip(several, exact, strict=True):
        torch.testing.assert_close(batch, torch.stack([one, 2 * one]))


def test_compiled_autograd_traces_the_backward_pass(target: Target) -> None:
    inputs = [torch.randn(2, 3, 4, device=target.device).requires_grad_() for _ in range(2)]
    inputs.append(torch.rand(3, device=target.device).requires_grad_())
    exact = torch.autograd.grad(scale_bias_mix(*inputs).sum(), inputs)
    out = scale_bias_mix(*inputs).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        out.backward()
    for t, g in zip(inputs, exact, strict=True):
        torch.testing.assert_close(t.grad, g)


def test_backward_is_deterministic(target: Target) -> None:
    lb, ema, grad = torch.randn(3, 16, 33, 15, 17, device=target.device).unbind()
    for scale_shape in ((), (33,)):
        scale = torch.ones(scale_shape, device=target.device, requires_grad=True)
        runs = [torch.autograd.grad(scale_bias_mix(lb, ema, scale), scale, grad)[0] for _ in range(4)]
        assert all(torch.equal(r, runs[0]) for r in runs)


def test_scale_gradient_of_bfloat16_maps_is_summed_in_float32(target: Target) -> None:
    n = 40_000
    lb, ema = (
        torch.ones(1, 1, n, dtype=torch.bfloat16, device=target.device),
        torch.zeros(1, 1, n, dtype=torch.bfloat16, device=target.device),
    )
    for shape in ((), (1,)):
        scale = torch.ones(shape, device=target.device, requires_grad=True)
        scale_bias_mix(lb, ema, scale).backward(torch.ones_like(lb))
        assert scale.grad is not None
        assert scale.grad.item() == n, "in bfloat16 the sum would stop at 256"


def test_special_values(target: Target) -> None:
    inf, nan = math.inf, math.nan
    lb = torch.tensor([inf, nan, 1.0, inf, -inf] * 9, device=target.device)
    ema = torch.tensor([1.0, 1.0, inf, inf, inf] * 9, device=target.device)
    out = scale_bias_mix(lb, ema, torch.tensor(0.5, device=target.device))
    expected = torch.tensor([inf, nan, inf, inf, nan] * 9, device=target.device)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)


def test_autograd_sees_a_write_to_what_was_kept(target: Target) -> None:
    lb, ema = torch.randn(2, 3, 4, device=target.device).unbind()
    lb = lb.clone()
    out = scale_bias_mix(lb, ema, torch.ones((), device=target.device, requires_grad=True))
    lb.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("case", misuse.SCALE_BIAS_MIX)
def test_misuse(case: str, backend: str) -> None:
    misuse.check_scale_bias_mix(case, backend)


@pytest.mark.skipif(not os.environ.get("MANPP_TEST_LARGE"), reason="needs 17 GB: set MANPP_TEST_LARGE=1")
def test_more_than_2_to_31_elements(target: Target) -> None:
    if target == Target("eager", "cpu"):
        pytest.skip("its temporaries need 40 GB")
    n = 2**31 + 17
    lb = torch.zeros(n, dtype=torch.bfloat16, device=target.device)
    lb[-1] = 4.0
    out = scale_bias_mix(lb, lb, torch.tensor(0.5, device=target.device))
    assert out[-1].item() == 8.0
    assert count(out, 0.0) == n - 1


def test_transforms_of_torch_func_and_forward_mode() -> None:
    """Of which a compiled operator knows nothing: PyTorch would take its derivative for zero."""
    a, b, scale = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.randn(2)

    def of_scale(s: Tensor) -> Tensor:
        return scale_bias_mix(a, b, s)

    _, tangent = torch.func.jvp(of_scale, (scale,), (torch.ones(2),))
    assert torch.allclose(tangent, a - b)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(scale, torch.ones(2))
        tangent = torch.autograd.forward_ad.unpack_dual(of_scale(dual)).tangent
    assert torch.allclose(tangent, a - b)
    gradient = torch.func.grad(lambda s: of_scale(s).sum())(scale)
    assert torch.allclose(gradient, (a - b).sum((0, 2)), atol=1e-5)
    assert torch.equal(
        torch.func.vmap(lambda x, y: scale_bias_mix(x, y, scale[0]))(a, b), scale_bias_mix(a, b, scale[0])
    )
