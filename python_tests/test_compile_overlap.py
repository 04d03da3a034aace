"""Tensors that share memory with one that is written, in compiled code, where there are no addresses to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from manpp_kernels import detach_copy, ema_scale_update
from manpp_kernels.ops._checks import OverlapError

Function = Callable[[Tensor, Tensor], Any]

# Of two different tensors of twelve elements.
OVERLAP: dict[str, tuple[Function, str]] = {
    "ema views": (lambda x, y: ema_scale_update([x[:6], x[4:]], [y[:6], y[4:]], 0.5), r"ema\[1\] overlaps ema\[0\]"),
    "ema twice": (lambda x, y: ema_scale_update([x, x], [y, y], 0.5), r"ema\[1\] overlaps ema\[0\]"),
    "ema is params": (lambda x, y: ema_scale_update([y, x], [y + 1, x], 0.5), r"ema\[1\] overlaps params\[1\]"),
    "ema and params views": (lambda x, y: ema_scale_update(x[1:], x[:-1], 0.5), r"ema\[0\] overlaps params\[0\]"),
    "ema transposed": (
        lambda x, y: ema_scale_update(x.view(3, 4).t(), x.view(4, 3), 0.5),
        r"ema\[0\] overlaps params\[0\]",
    ),
    "ema holds momentum": (lambda x, y: ema_scale_update(x, y, x[3]), r"ema\[0\] overlaps momentum"),
    "ema holds scale": (
        lambda x, y: ema_scale_update(x, y, 0.5, scale=x[11], bias=y),
        r"ema\[0\] overlaps scale",
    ),
    "ema is bias": (
        lambda x, y: ema_scale_update(x, y, 0.5, scale=y[0], bias=x.view(12)),
        r"ema\[0\] overlaps bias\[0\]",
    ),
    "across dtypes": (
        lambda x, y: ema_scale_update(x[:3], x.view(torch.bfloat16)[5:8], 0.5),
        r"ema\[0\] overlaps params\[0\]",
    ),
    "ema expanded": (lambda x, y: ema_scale_update(x[:1].expand(12), y, 0.5), r"ema\[0\] has elements that share"),
    "out is x": (lambda x, y: detach_copy(x, x), "out overlaps x"),
    "out overlaps x": (lambda x, y: detach_copy(x[:8], x[4:]), "out overlaps x"),
    "out expanded": (lambda x, y: detach_copy(x, y[:1].expand(12)), "out has elements that share"),
}
NO_OVERLAP: dict[str, Function] = {
    "neighbours": lambda x, y: ema_scale_update([x[:4], x[4:8]], [x[8:], y[:4]], 0.5),
    "params twice": lambda x, y: ema_scale_update([x[:4], x[4:8]], [y[:4], y[:4]], 0.5),
    "columns": lambda x, y: ema_scale_update(x.view(6, 2)[:, 0], x.view(6, 2)[:, 1], 0.5),
    "no elements": lambda x, y: ema_scale_update([x, x[:0]], [y, x[:0]], 0.5),
    "scale and bias": lambda x, y: ema_scale_update(x[:4], y[:4], y[1], scale=y[0], bias=y[:4]),
    "out beside x": lambda x, y: detach_copy(x[:6], x[6:]),
}


def numbers() -> tuple[Tensor, Tensor]:
    return torch.arange(12.0), torch.full((12,), 0.5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", OVERLAP)
def test_overlap(case: str, dynamic: bool) -> None:
    function, message = OVERLAP[case]
    x, y = numbers()
    with pytest.raises(ValueError, match=message):
        function(x, y)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(function, backend="aot_eager", dynamic=dynamic)(x, y)
    assert torch.equal(x, numbers()[0])
    assert torch.equal(y, numbers()[1])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", NO_OVERLAP)
def test_no_overlap(case: str, dynamic: bool) -> None:
    (x, y), (found, other) = numbers(), numbers()
    NO_OVERLAP[case](x, y)
    torch._dynamo.reset()
    torch.compile(NO_OVERLAP[case], backend="aot_eager", dynamic=dynamic, fullgraph=True)(found, other)
    assert torch.equal(found, x)
    assert not torch.equal(x, numbers()[0])


def test_arguments_of_the_compiled_function() -> None:
    torch._dynamo.reset()
    update = torch.compile(lambda a, b: ema_scale_update(a, b, 0.5), backend="aot_eager")
    x, _ = numbers()
    for pair in ((x[:6], x[4:10]), (x, x)):
        with pytest.raises(RuntimeError, match=r"ema\[0\] overlaps params\[0\]"):
            update(*pair)
    update(x[:6], x[6:])
    assert x[:6].tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_sizes_that_depend_on_data() -> None:
    """Let through, as the docstring says of what is not known."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def update(x: Tensor, n: Tensor) -> Tensor:
        kept = x[: n.item()] * 1
        ema_scale_update(kept, torch.ones_like(kept), 0.5)
        return kept

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert update(torch.zeros(4), torch.tensor(3)).tolist() == [0.5] * 3


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(12)
        with pytest.raises(OverlapError):
            ema_scale_update(x[:6], x[1:7], 0.5)
    x = torch.empty(12, device="meta")
    with pytest.raises(OverlapError):
        detach_copy(x[:6], x[1:7])
    detach_copy(x[:6], x[6:])
