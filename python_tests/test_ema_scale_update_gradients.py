"""The gradients of the effective weights that ``ema_scale_update`` returns."""

from __future__ import annotations

import pytest
import torch
from conftest import TARGETS, Target
from reference import (
    DTYPES,
    LAYOUTS,
    arithmetic_dtype,
    assert_close,
    clones,
    not_contiguous,
    samples,
    sum_ops,
)

import manpp_kernels.ops.ema_scale_update_backward as module
from manpp_kernels import EmaPlan, backends, ema_scale_update, use_backend


@pytest.mark.parametrize("scale_shape", [(), (3,)])
def test_gradcheck(target: Target, scale_shape: tuple[int, ...]) -> None:
    start = list(torch.randn(4, 2, 3, dtype=torch.float64, device=target.device).unbind())
    params = list(torch.randn(4, 2, 3, dtype=torch.float64, device=target.device).unbind())
    bias = [torch.randn(2, 3, dtype=torch.float64, device=target.device, requires_grad=True) for _ in start]
    scale = torch.randn(scale_shape, dtype=torch.float64, device=target.device, requires_grad=True)
    groups = [0, 2, 2, 1] if scale_shape else None

    def weights(scale, *bias):
        ema = clones(start)
        return tuple(ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=groups, total=1.5))

    assert torch.autograd.gradcheck(weights, (scale, *bias))
    assert torch.autograd.gradgradcheck(weights, (scale, *bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ema_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_gradients(target: Target, ema_dtype: torch.dtype, bias_dtype: torch.dtype, layout: str) -> None:
    shapes = [(2, 3, 4, 5), (257,), (0,)]
    ema_layout = LAYOUTS[LAYOUTS.index(layout) - 1]
    ema = [s.view for s in samples(shapes, ema_dtype, ema_layout, device=target.device)]
    params = [s.view for s in samples(shapes, ema_dtype, seed=9, device=target.device)]
    bias = [s.view.requires_grad_() for s in samples(shapes, bias_dtype, layout, seed=20, device=target.device)]
    grads = [s.view for s in samples(shapes, bias_dtype, seed=30, device=target.device)]
    scale = torch.tensor([0.75, 0.5], device=target.device, requires_grad=True)
    groups = [1, 1, 0]
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=groups)
    got_scale, *got_bias = torch.autograd.grad(weights, [scale, *bias], grads)
    arithmetic = torch.float64 if torch.float64 in (ema_dtype, bias_dtype) else torch.float32
    for i, g in enumerate(grads):
        exact = 0.5 * g.double() if groups[i] else 0.75 * g.double()
        assert_close(got_bias[i], exact, exact.abs(), ops=2, arithmetic=arithmetic, what=f"grad of bias[{i}]")
    terms = [g.double() * (b.detach().double() - e.double()) for g, b, e in zip(grads, bias, ema, strict=True)]
    exact = torch.stack([terms[2].sum(), terms[0].sum() + terms[1].sum()])
    magnitude = torch.stack([terms[2].abs().sum(), terms[0].abs().sum() + terms[1].abs().sum()])
    assert_close(got_scale, exact, magnitude, ops=20, arithmetic=torch.float32, what="grad of scale")


@pytest.mark.parametrize("layout", ["contiguous", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_several_chunks_in_several_groups(target: Target, dtype: torch.dtype, layout: str) -> None:
    sizes, groups = [5000, 1, 0, 12_289, 4097, 1025, 70_001], [2, 0, 1, 2, 0, 2, 0]
    ema, params, bias, grads = (
        [s.view for s in samples([(n,) for n in sizes], dtype, kind, seed=10 * k, device=target.device)]
        for k, kind in enumerate(("contiguous", "contiguous", layout, "contiguous"))
    )
    arithmetic = arithmetic_dtype(ema[0])
    scale = torch.tensor([0.3, 0.7, -1.1], dtype=arithmetic, device=target.device, requires_grad=True)
    bias = [b.requires_grad_() for b in bias]
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=groups)
    got_scale, *got_bias = torch.autograd.grad(weights, [scale, *bias], grads)
    sums, magnitudes = torch.zeros(2, 3, dtype=torch.float64, device=target.device)
    for i, (g, b, e) in enumerate(zip(grads, bias, ema, strict=True)):
        exact = scale.detach()[groups[i]].double() * g.double()
        assert_close(got_bias[i], exact, exact.abs(), ops=2, arithmetic=arithmetic, what=f"grad of bias[{i}]")
        terms = g.double() * (b.detach().double() - e.double())
        sums[groups[i]] += terms.sum()
        magnitudes[groups[i]] += terms.abs().sum()
    assert_close(got_scale, sums, magnitudes, ops=sum_ops(sum(sizes)), arithmetic=arithmetic, what="grad of scale")


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].backend != "eager"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", ["scale and bias", "bias"])
def test_too_large_for_the_caches(target: Target, dtype: torch.dtype, wanted: str) -> None:
    """More than 32 MB of gradients, which the CPU's kernel writes otherwise; eager has one way for all."""
    sizes = (0, (33 << 20) // dtype.itemsize, 1, 1049)
    ema, params, bias, grads = ([torch.randn(n, dtype=dtype, device=target.device) for n in sizes] for _ in range(4))
    scale = torch.tensor(0.5, device=target.device, requires_grad=wanted != "bias")
    bias = [b.requires_grad_() for b in bias]
    weights = ema_scale_update(ema, params, 0.75, scale=scale, bias=bias)
    got = torch.autograd.grad(weights, [scale, *bias] if scale.requires_grad else bias, grads)
    assert all(torch.equal(found, grad / 2) for found, grad in zip(got[-len(grads) :], grads, strict=True))
    if scale.requires_grad:
        terms = torch.cat(
            [g.double() * (b.detach().double() - e.double()) for g, b, e in zip(grads, bias, ema, strict=True)]
        )
        assert_close(
            got[0], terms.sum(), terms.abs().sum(), ops=sum_ops(sum(sizes)), arithmetic=torch.float32, what="scale"
        )


@pytest.mark.skipif(not backends.CPU_COMPILED, reason="the CPU kernels are not built")
@pytest.mark.parametrize("wanted", ["scale and bias", "scale", "bias"])
def test_the_common_case_gives_the_bits_of_the_long_way(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that checks its arguments itself takes plain tensors, and leaves all others alone."""
    common = module._backward_in_common_case
    took = []

    def gradients(common_case: bool) -> list[torch.Tensor]:
        def backward_in_common_case(*args):
            found = common(*args) if common_case else []
            took.append(bool(found))
            return found

        monkeypatch.setattr(module, "_backward_in_common_case", backward_in_common_case)
        torch.manual_seed(0)
        shapes = [(2, 3, 4, 5), (5000,), (0,), (7, 3)]
        ema, params, bias, grads = ([torch.randn(s) for s in shapes] for _ in range(4))
        scale = torch.tensor([0.75, 0.5], requires_grad="scale" in wanted)
        bias = [b.requires_grad_("bias" in wanted) for b in bias]
        inputs = [*([scale] if "scale" in wanted else []), *(bias if "bias" in wanted else [])]
        weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=[1, 0, 1, 1])
        plain = torch.autograd.grad(weights, inputs, grads, retain_graph=True)
        some = torch.autograd.grad(weights[1::2], inputs, grads[1::2], retain_graph=True, allow_unused=True)
        expanded = torch.autograd.grad([w.sum() for w in weights], inputs)  # of no memory of their own
        return [torch.zeros(()) if g is None else g for g in (*plain, *some, *expanded)]

    with use_backend("cpu"):
        assert all(map(torch.equal, gradients(True), gradients(False)))
    assert took == [True, True, False] + [False] * 3


@pytest.mark.parametrize("way", ["operator", "plan"])
def test_a_scale_that_is_not_contiguous(target: Target, way: str) -> None:
    ema, params, bias, grad = (list(x) for x in torch.randn(4, 3, 50, device=target.device).unbind())
    bias = [b.requires_grad_() for b in bias]
    values = torch.rand(3, device=target.device) + 0.5
    for view in (not_contiguous(values), values[:1].expand(3)):
        scale = view.detach().requires_grad_()
        assert not scale.is_contiguous()
        if way == "operator":
            weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=[2, 0, 1])
        else:
            weights = EmaPlan(ema, params, bias=bias, groups=[2, 0, 1]).update(0.9, scale=scale)
        got_scale, *got_bias = torch.autograd.grad(weights, [scale, *bias], grad)
        for i, g in enumerate((2, 0, 1)):
            s = scale.detach()[g]
            torch.testing.assert_close(weights[i], s * bias[i] + (2 - s) * ema[i])
            torch.testing.assert_close(got_bias[i], s * grad[i])
            torch.testing.assert_close(got_scale[g], (grad[i] * (bias[i] - ema[i])).sum())


def test_only_the_gradients_asked_for(target: Target) -> None:
    def run(scale_grad, bias_grad):
        ema, params, bias = torch.randn(3, 2, 8, device=target.device).unbind()
        bias = [b.clone().requires_grad_(bias_grad) for b in bias]
        scale = torch.ones((), device=target.device, requires_grad=scale_grad)
        return scale, bias, ema_scale_update(list(ema), list(params), 0.9, scale=scale, bias=bias)

    scale, bias, weights = run(True, False)
    weights[0].sum().backward()  # and not every output is used
    assert scale.grad is not None
    assert bias[0].grad is None
    scale, bias, weights = run(False, True)
    weights[1].sum().backward()
    assert scale.grad is None
    assert bias[1].grad is not None
    assert not run(False, False)[2][0].requires_grad
    with torch.no_grad():
        assert not run(True, True)[2][0].requires_grad


def test_the_last_of_the_weights_alone(target: Target) -> None:
    ema, params, bias = (list(t) for t in torch.randn(3, 3, 8, device=target.device).unbind())
    bias = [b.requires_grad_() for b in bias]
    scale = torch.tensor([0.75, 0.5], device=target.device, requires_grad=True)
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=[0, 0, 1])
    got_scale, *got_bias = torch.autograd.grad(weights[2].sum(), [scale, *bias], allow_unused=True)
    torch.testing.assert_close(got_scale, torch.stack([scale[0] * 0, (bias[2] - ema[2]).sum()]).detach())
    assert got_bias[:2] == [None, None]
    assert got_bias[2].tolist() == [0.5] * 8


def test_backward_is_deterministic(target: Target) -> None:
    def gradient():
        torch.manual_seed(1)
        ema, params, bias = torch.randn(3, 5, 20_000, device=target.device).unbind()
        scale = torch.ones(2, device=target.device, requires_grad=True)
        groups = [0, 1, 0, 1, 1]
        weights = ema_scale_update(list(ema), list(params), 0.9, scale=scale, bias=list(bias), groups=groups)
        return torch.autograd.grad(weights, scale, [w.detach() for w in weights])[0]

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_to_be_differentiated_again_is_as_exact(target: Target, dtype: torch.dtype) -> None:
    ema, params, bias, grad = (list(x) for x in torch.randn(4, 3, 500, device=target.device).to(dtype).unbind())
    bias = [b.requires_grad_() for b in bias]
    scale = torch.tensor(0.75, dtype=dtype, device=target.device, requires_grad=True)
    weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias)
    grad = [g.requires_grad_() for g in grad]
    found = [torch.autograd.grad(weights, scale, grad, retain_graph=True, create_graph=c)[0] for c in (False, True)]
    exact = sum((g.double() * (b.double() - e.double())).sum() for g, b, e in zip(grad, bias, ema, strict=True))
    for got in found:
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_several_gradients_at_once(target: Target) -> None:
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` asks for them."""
    ema, params, bias = torch.randn(3, 2, 3, device=target.device).unbind()
    bias = bias.clone().requires_grad_()
    scale = torch.tensor(0.75, device=target.device, requires_grad=True)
    (weights,) = ema_scale_update([ema], [params], 0.9, scale=scale, bias=[bias])
    rows = torch.eye(6, device=target.device).view(6, 2, 3)
    at_once = torch.autograd.grad(weights, [scale, bias], rows, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(weights, [scale, bias], row, retain_graph=True) for row in rows]
    for got, want in zip(at_once, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
