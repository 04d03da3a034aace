"""``torch.func`` and forward mode inside ``torch.compile``: derivatives are those outside of it, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from manpp_kernels import detach_copy, ema_scale_update, scale_bias_mix


def compiled(function: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=fullgraph, backend="aot_eager")


def _dual_numbers(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _jvp(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": _jvp,
    "dual numbers": _dual_numbers,
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).square().sum())(x),
    "vmap": lambda function, x: torch.func.vmap(function)(torch.stack([x, 2 * x])),
}
DERIVATIVES = [name for name in TRANSFORMS if name != "vmap"]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_mix(transform: str) -> None:
    a, b, scale = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.tensor(1.5)
    for function, x in ((lambda q: scale_bias_mix(q, b, scale), a), (lambda s: scale_bias_mix(a, b, s), scale)):

        def derivative(x: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return TRANSFORMS[transform](function, x)

        expected = derivative(x)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(compiled(derivative)(x), expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_detach_copy(transform: str) -> None:
    x = torch.randn(2, 3)
    for function in (lambda q: detach_copy(q) * q, lambda q: detach_copy(q, torch.zeros_like(q)) * q):

        def derivative(x: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return TRANSFORMS[transform](function, x)

        torch.testing.assert_close(compiled(derivative)(x), derivative(x))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("transform", DERIVATIVES)
def test_effective_weights_are_refused(transform: str, fullgraph: bool) -> None:
    if transform == "dual numbers" and not fullgraph and torch.__version__.startswith("2.10."):
        pytest.skip("to a function that PyTorch 2.10 compiles, a dual number that it is given has no tangent")
    ema, params, bias, scale = torch.randn(3), torch.randn(3), torch.randn(3), torch.tensor(1.5)
    before = ema.clone()

    def of_scale(s: Tensor) -> Tensor:
        return ema_scale_update(ema, params, 0.9, scale=s, bias=bias)[0]

    def of_bias(b: Tensor) -> Tensor:
        return ema_scale_update(ema, params, 0.9, scale=scale, bias=b)[0]

    for function, x in ((of_scale, scale), (of_bias, bias)):

        def derivative(x: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return TRANSFORMS[transform](function, x)

        # With fullgraph=True the error of what is traced is told by one of torch.compile, a RuntimeError, too.
        with pytest.raises(RuntimeError, match=r"not differentiable by torch\.func or in forward mode"):
            compiled(derivative, fullgraph=fullgraph)(x)
    assert torch.equal(ema, before)


def test_an_update_of_its_own_inside_a_transform() -> None:
    """Nothing the transform sees is written: the update is what it is outside of the transform."""
    ema, params, x = torch.zeros(3), torch.ones(3), torch.randn(3)

    def gradient(x: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            ema_scale_update(ema, params, 0.5)
            return (x * ema).sum()

        return torch.func.grad(loss)(x)

    assert compiled(gradient)(x).tolist() == [0.5] * 3
    assert ema.tolist() == [0.5] * 3


def test_compiled_outside_of_a_transform_and_called_inside() -> None:
    """What was traced without one is traced anew."""
    x, other, scale = torch.randn(2, 3), torch.randn(2, 3), torch.tensor(1.5)
    mix = compiled(lambda q: scale_bias_mix(q, other, scale), fullgraph=False)
    for _ in range(2):
        assert torch.equal(mix(x), scale_bias_mix(x, other, scale))
        for transform in (_jvp, _dual_numbers):
            assert torch.equal(transform(mix, x), torch.full((2, 3), 1.5))


def test_without_a_transform_the_graph_has_the_operators() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph

    def everything(x: Tensor, scale: Tensor) -> Tensor:
        weight = ema_scale_update(x.clone(), x, 0.5, scale=scale, bias=x)[0]
        return scale_bias_mix(detach_copy(x), weight, scale)

    torch._dynamo.reset()
    torch.compile(everything, fullgraph=True, backend=backend)(torch.ones(3), torch.ones(()))
    assert len(graphs) == 1
    for operator in ("ema_scale_update", "detach_copy", "scale_bias_mix"):
        assert f"manpp_kernels.{operator}.default" in graphs[0]


def _updated(ema: Tensor, params: Tensor) -> Tensor:
    ema = ema.detach().clone()
    ema_scale_update(ema, params.detach(), 0.5)
    return ema + params


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("scale_bias_mix", lambda x, y: scale_bias_mix(x, y, x.sum() * 0 + 0.5)),
        ("detach_copy", lambda x, y: detach_copy(x) + y),
        ("detach_copy", lambda x, y: detach_copy(x, torch.zeros(3, 4)) + y),
        ("ema_scale_update", _updated),
    ],
    ids=["mix", "new copy", "copy", "update"],
)
def test_a_traced_graph_has_the_operators_of_the_package(name: str, function: Any, pre_dispatch: bool) -> None:
    """And none that serves calls outside of graphs alone, which autograd passes by."""
    inputs = [torch.randn(3, 4).requires_grad_() for _ in range(2)]
    graph = make_fx(function, pre_dispatch=pre_dispatch)(*inputs)
    called = [str(node.target) for node in graph.graph.nodes if "manpp_kernels" in str(node.target)]
    assert called == [f"manpp_kernels.{name}.default"]
    assert sum("empty" in str(node.target) for node in graph.graph.nodes) <= 1
    exact = function(*inputs)
    again = graph(*inputs)
    assert torch.equal(again, exact)
    if pre_dispatch:
        assert again.requires_grad == exact.requires_grad
