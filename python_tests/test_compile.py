"""The operators as PyTorch sees them: opcheck, ``torch.compile(fullgraph=True)``, autocast, fake tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import manpp_kernels
from manpp_kernels import detach_copy, ema_scale_update, scale_bias_mix

OPS = torch.ops.manpp_kernels


def randn(*shape: int, device: str, **options: Any) -> Tensor:
    return torch.randn(shape, **options).to(device)


def ema_arguments(
    device: str, *, weights: bool = False, stochastic: bool = False, tensor_momentum: bool = False
) -> tuple[Any, ...]:
    shapes = [(3,), (2, 4), (0,)]
    ema = [randn(*s, device=device).bfloat16() for s in shapes]
    params = [randn(*s, device=device) for s in shapes]
    bias = [randn(*s, device=device) for s in shapes] if weights else []
    return (
        ema,
        params,
        0.9,
        torch.tensor(0.8, device=device) if tensor_momentum else None,
        torch.tensor([1.0, 0.5], device=device) if weights else None,
        bias,
        [0, 1, 1] if weights else [],
        2.0,
        torch.tensor(3, device=device) if stochastic else None,
        [torch.empty_like(b) for b in bias],
    )


def ema_backward_arguments(device: str, *, bias: bool = False, scale: bool = False) -> tuple[Any, ...]:
    tensors = [[randn(3, device=device), randn(2, 4, device=device)] for _ in range(4)]
    scales = torch.tensor([1.0, 0.5], device=device)
    return (
        tensors[0],
        tensors[1] if scale else [],
        tensors[2] if scale else [],
        scales,
        [1, 0],
        2.0,
        tensors[3] if bias else [],
        torch.zeros_like(scales) if scale else None,
    )


def mix_arguments(device: str, *, channels: bool = False, grad: bool = False) -> tuple[Any, ...]:
    lb, ema = (randn(2, 3, 4, 5, device=device).requires_grad_(grad) for _ in range(2))
    return lb, ema, randn(*((3,) if channels else ()), device=device).requires_grad_(grad), 2.0


def mix_backward_arguments(device: str, *, lb: bool = False, ema: bool = False, scale: bool = False) -> tuple[Any, ...]:
    grad, lb_out, ema_out = (randn(2, 3, 4, device=device) for _ in range(3))
    maps = (lb_out, ema_out) if scale else (None, None)
    return grad, *maps, randn(3, device=device), 2.0, lb, ema


SCHEMAS: dict[str, tuple[str, Callable[..., tuple[Any, ...]], dict[str, bool]]] = {
    "ema": ("ema_scale_update", ema_arguments, {}),
    "ema, weights": ("ema_scale_update", ema_arguments, {"weights": True, "tensor_momentum": True}),
    "ema, stochastic": ("ema_scale_update", ema_arguments, {"weights": True, "stochastic": True}),
    "ema backward": ("ema_scale_update_backward", ema_backward_arguments, {"bias": True, "scale": True}),
    "ema backward, scale": ("ema_scale_update_backward", ema_backward_arguments, {"scale": True}),
    "ema backward, bias": ("ema_scale_update_backward", ema_backward_arguments, {"bias": True}),
    "mix": ("scale_bias_mix", mix_arguments, {"grad": True}),
    "mix, channels": ("scale_bias_mix", mix_arguments, {"grad": True, "channels": True}),
    "mix, no gradients": ("scale_bias_mix", mix_arguments, {}),
    "mix backward": ("scale_bias_mix_backward", mix_backward_arguments, {"lb": True, "ema": True, "scale": True}),
    "mix backward, lb": ("scale_bias_mix_backward", mix_backward_arguments, {"lb": True}),
    "mix backward, scale": ("scale_bias_mix_backward", mix_backward_arguments, {"scale": True}),
}


def overload(operator: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(OPS, operator), backend if backend in ("eager", "triton") else "default")


@pytest.mark.parametrize("case", SCHEMAS)
def test_opcheck(target: Target, case: str) -> None:
    """Schema (what is written, what aliases), autograd registration, fake kernel, and tracing, on real arguments."""
    operator, arguments, options = SCHEMAS[case]
    torch.library.opcheck(overload(operator, target.backend), arguments(target.device, **options))


@pytest.mark.parametrize("formats", [(torch.contiguous_format, torch.channels_last), (torch.channels_last,) * 2])
def test_opcheck_detach_copy(target: Target, formats: tuple[torch.memory_format, torch.memory_format]) -> None:
    x = randn(2, 3, 4, 5, device=target.device).to(memory_format=formats[0])
    out = torch.empty_like(x, dtype=torch.bfloat16, memory_format=formats[1])
    torch.library.opcheck(overload("detach_copy", target.backend), (x, out))


def test_every_operator_has_every_overload() -> None:
    for operator in {case[0] for case in SCHEMAS.values()} | {"detach_copy"}:
        assert set(getattr(OPS, operator).overloads()) == {"default", "eager", "triton"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    # aot_eager traces, functionalises and partitions as inductor does; the code it would generate is not ours.
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("momentum_kind", ["float", "tensor"])
def test_compile_ema(target: Target, momentum_kind: str) -> None:
    def step(ema, params, momentum):
        ema_scale_update(ema, params, momentum)
        return [e * 2 for e in ema]  # a use after the write has to see it

    fast = compiled(step)
    for value in (0.9, 0.5, 0.25):
        momentum = value if momentum_kind == "float" else torch.tensor(value, device=target.device)
        params = [randn(3, 4, device=target.device), randn(7, device=target.device)]
        ema = [randn(3, 4, device=target.device), randn(7, device=target.device)]
        expected = [e.clone() for e in ema]
        expected_doubled = step(expected, params, momentum)
        doubled = fast(ema, params, momentum)
        for a, b in zip(ema + doubled, expected + expected_doubled, strict=True):
            assert torch.equal(a, b)


def test_compile_effective_weights_and_their_gradients(target: Target) -> None:
    def loss(ema, params, scale, bias):
        weights = ema_scale_update(ema, params, 0.9, scale=scale, bias=bias, groups=[1, 0])
        return sum((w**2).sum() for w in weights)

    results = []
    for function in (loss, compiled(loss)):
        torch.manual_seed(4)
        ema, params = ([randn(3, 4, device=target.device), randn(7, device=target.device)] for _ in range(2))
        bias = [randn(3, 4, device=target.device).requires_grad_(), randn(7, device=target.device).requires_grad_()]
        scale = torch.tensor([0.5, 0.75], device=target.device, requires_grad=True)
        value = function(ema, params, scale, bias)
        value.backward()
        results.append([value, *ema, scale.grad, *[b.grad for b in bias]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compile_stochastic_rounding(target: Target) -> None:
    fast = compiled(lambda ema, params: ema_scale_update(ema, params, 0.0, rounding="stochastic"))
    params = torch.full((20_000,), 1 + 2**-9, device=target.device)
    ema = [torch.zeros(20_000, dtype=torch.bfloat16, device=target.device) for _ in range(2)]
    for e in ema:
        fast([e], [params])
    assert not torch.equal(ema[0], ema[1]), "the seed is drawn at each run, not when the graph is traced"
    assert abs((ema[0] > 1).double().mean().item() - 0.25) < 0.02


@pytest.mark.parametrize("channels", [False, True])
def test_compile_mix(target: Target, channels: bool) -> None:
    def block(x, y, scale):
        return scale_bias_mix(torch.relu(x), torch.tanh(y), scale).square().mean()

    results = []
    for function in (block, compiled(block)):
        torch.manual_seed(4)
        x, y = (randn(2, 3, 4, 5, device=target.device).requires_grad_() for _ in range(2))
        scale = torch.ones((3,) if channels else (), device=target.device, requires_grad=True)
        value = function(x, y, scale)
        value.backward()
        results.append([value, x.grad, y.grad, scale.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compile_mix_with_dynamic_shapes(target: Target) -> None:
    fast = torch.compile(scale_bias_mix, fullgraph=True, backend="aot_eager", dynamic=True)
    scale = torch.tensor(0.5, device=target.device)
    for batch in (2, 3, 7):
        lb, ema = (randn(batch, 3, 4, device=target.device) for _ in range(2))
        assert torch.equal(fast(lb, ema, scale), scale_bias_mix(lb, ema, scale))


def test_compile_detach_copy(target: Target) -> None:
    def boundary(x, weight):
        y = x * weight
        return detach_copy(y, dtype=torch.bfloat16, memory_format=torch.channels_last), y.sum()

    x, weight = randn(2, 3, 4, 5, device=target.device), torch.tensor(2.0, device=target.device, requires_grad=True)
    y, total = compiled(boundary)(x, weight)
    assert torch.equal(y, (x * 2).bfloat16())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.requires_grad
    total.backward()
    assert weight.grad is not None


def test_compile_detach_copy_into_out(target: Target) -> None:
    def write(x, out):
        detach_copy(x, out)
        return out + 1

    x, out = randn(3, 4, device=target.device), torch.zeros(3, 4, device=target.device)
    assert torch.equal(compiled(write)(x, out), x + 1)
    assert torch.equal(out, x)


def test_a_compiled_graph_records_the_backend() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    with manpp_kernels.use_backend("eager"):
        torch.compile(lambda x: detach_copy(x), fullgraph=True, backend=backend)(torch.ones(3))
    assert "detach_copy.eager" in graphs[0]


def test_compile_with_inductor() -> None:
    """Once through the default compiler, as a user would."""

    def step(ema, params, lb, scale):
        ema_scale_update(ema, params, 0.9)
        return detach_copy(scale_bias_mix(lb, ema[0] + 1, scale)).sum()

    torch._dynamo.reset()
    ema, params, lb = torch.randn(3, 6).unbind()
    scale, expected = torch.ones(()), ema.clone()
    value = step([expected], [params], lb, scale)
    ema = ema.clone()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)([ema], [params], lb, scale), value)
    assert torch.equal(ema, expected)


def _saved_then_updated(x: Tensor, p: Tensor) -> Tensor:
    y = (x * p).sum()
    ema_scale_update([x], [p.detach()], 0.5)
    return y


def _saved_then_copied_into(x: Tensor, p: Tensor) -> Tensor:
    y = (x * p).sum()
    detach_copy(p.detach(), x)
    return y


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", [_saved_then_updated, _saved_then_copied_into])
def test_what_was_saved_for_a_backward_pass_and_then_written_is_an_error(
    target: Target, function: Callable[..., Tensor], compiled: bool
) -> None:
    """A gradient of other values would come out, and did in compiled functions."""
    call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    x, p = torch.full((3,), 2.0, device=target.device), torch.ones(3, device=target.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call(x, p).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(target: Target, dtype: torch.dtype) -> None:
    """Under autocast the maps come out of layers in half precision; scale stays a float32 parameter."""
    layers = [torch.nn.Linear(8, 8, device=target.device) for _ in range(2)]
    scale = torch.ones((), device=target.device, requires_grad=True)
    x = randn(4, 8, device=target.device)
    with torch.autocast(target.device, dtype=dtype):
        lb, ema = layers[0](x), layers[1](x)
        out = scale_bias_mix(lb, ema, scale)
        copy = detach_copy(out)
        weight = ema_scale_update(
            layers[0].weight.detach().clone(), layers[1].weight, 0.5, scale=scale, bias=layers[0].weight
        )
    assert lb.dtype == out.dtype == copy.dtype == dtype
    assert weight[0].dtype == torch.float32, "weights stay as they are; the layer that uses them casts"
    torch.testing.assert_close(out, lb + ema)
    (out.float().sum() + weight[0].sum()).backward()
    assert scale.grad.dtype == layers[0].weight.grad.dtype == layers[1].weight.grad.dtype == torch.float32


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
        out = scale_bias_mix(x, x, torch.ones(3))
        assert out.stride() == x.stride()
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
        assert detach_copy(x, dtype=torch.half).dtype == torch.half
        ema, bias = [torch.empty(3)], [torch.empty(3, dtype=torch.bfloat16)]
        (weight,) = ema_scale_update(ema, [torch.empty(3)], 0.9, scale=torch.ones(()), bias=bias)
        assert (weight.shape, weight.dtype) == ((3,), torch.bfloat16)


def test_dynamic_shapes_as_the_first_use_of_the_package() -> None:
    """What is read once in a process is read by then, and not in the middle of a trace."""
    code = """
import torch, manpp_kernels as mk
torch._dynamo.config.error_on_recompile = True
f = torch.compile(lambda a, b, s: mk.scale_bias_mix(a, b, s).relu(), backend="aot_eager", fullgraph=True, dynamic=True)
for n in (2, 3):
    a = torch.randn(n, 3, 4, 5, requires_grad=True)
    print(f(a, a * 2, torch.ones(3)).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "3"], done.stderr[-2000:]
