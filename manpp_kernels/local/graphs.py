"""A training step as a CUDA graph: the host launches it in one go, in place of each of its operations.

A local block is a network of its own, with a forward and a backward pass, and small ones are done before the host has
launched the next. A graph holds the launches of a whole step, at addresses and with numbers that do not change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manpp_kernels.local.step import StepResult

Compute = Callable[[Tensor, Tensor], StepResult]


class Device:
    """How a GPU runs, captures and replays; a test puts another in its place.

    Attributes:
        peak_bytes: the allocator's peak by the time of the last capture. Replays use as much, and the allocator, which
            then has no part in it, does not see it.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak_bytes = 0
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, call: Callable[[], Any]) -> Any:
        """Run on the stream that captures, so that what libraries and autograd set up for a stream is there by then."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def capture(self, call: Callable[[], Any]) -> Any:
        """Record what ``call`` launches, of which nothing runs yet; what it returns is filled by every replay."""
        self.forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = call()
        self._graph = graph
        self.peak_bytes = torch.cuda.max_memory_allocated(self._stream.device)
        return result

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def forget(self) -> None:
        self._graph = None


class StepGraph:
    """Runs the first steps as they are, then captures one and replays it.

    A batch of another shape, as the last one of an epoch, runs as it is. A step is captured anew where the optimizer's
    numbers have changed, as the learning rate from one epoch to the next.

    Args:
        compute: a whole step on images and targets, from dropping the gradients to the optimizer. What it does has to
            depend on tensors alone that stay where they are, and it must not wait for the device.
        optimizers: those it steps.
        device: where it runs.
    """

    WARM_UP = 3  # steps of a shape before one is captured: the optimizer's state, the plans, the libraries' choices

    def __init__(self, compute: Compute, optimizers: Sequence[torch.optim.Optimizer], device: Device) -> None:
        self._compute, self._optimizers, self._device = compute, optimizers, device
        self.forget()

    def forget(self) -> None:
        """Start over: something that the graph reads has moved, as the optimizer's state when one is loaded."""
        self._device.forget()
        self._seen: Counter[object] = Counter()
        self._numbers: object = None
        self._layout: object = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None

    @property
    def peak_bytes(self) -> int:
        """The memory of a replayed step, with all that lies there beside it; 0 where nothing is captured."""
        return self._device.peak_bytes if self._outputs is not None else 0

    def step(self, images: Tensor, targets: Tensor) -> StepResult:
        """One step; the result's tensors are the caller's own."""
        layout = tuple((t.shape, t.stride(), t.dtype) for t in (images, targets))
        if self._layout is None and self._seen[layout] >= self.WARM_UP:
            self._layout = layout
        if layout != self._layout:
            self._seen[layout] += 1
            return self._device.run(lambda: self._compute(images, targets))
        numbers = optimizer_numbers(self._optimizers)
        if self._outputs is None or numbers != self._numbers:
            self._capture(images, targets)
            self._numbers = numbers
        assert self._inputs is not None
        assert self._outputs is not None
        self._inputs[0].copy_(images)
        self._inputs[1].copy_(targets)
        self._device.replay()
        losses, logits = (t.clone() for t in self._outputs)
        return StepResult(list(losses.unbind()), logits)

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        if self._inputs is None:
            self._inputs = torch.empty_like(images), torch.empty_like(targets)
        inputs = self._inputs
        self._outputs = None  # memory of the graph before, which makes room for this one

        def call() -> tuple[Tensor, Tensor]:
            result = self._compute(*inputs)
            return torch.stack(result.losses), result.logits

        try:
            self._outputs = self._device.capture(call)
        except RuntimeError as error:
            self.forget()
            raise RuntimeError(
                f"this training step cannot be captured in a CUDA graph ({str(error).splitlines()[0]}); train with "
                "cuda_graphs=False"
            ) from error


def make_step_graph(compute: Compute, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> StepGraph:
    """A :class:`StepGraph` for a device.

    Raises:
        ValueError: the device is no GPU, or an optimizer cannot be captured.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, and the model is on {device}")
    check_capturable(optimizers)
    return StepGraph(compute, optimizers, Device(device))


def optimizer_numbers(optimizers: Sequence[torch.optim.Optimizer]) -> object:
    """Learning rates and whatever else of an optimizer is no tensor: a captured step has them written into it."""
    return [
        sorted((key, repr(value)) for key, value in group.items() if key != "params" and not isinstance(value, Tensor))
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def check_capturable(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise where a step of an optimizer depends on numbers of its own on the host, which a graph would repeat."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.SGD) or all(g.get("capturable") for g in optimizer.param_groups):
            continue
        name = type(optimizer).__name__
        if "capturable" in optimizer.defaults:
            raise ValueError(f"cuda_graphs needs an optimizer that can be captured: make {name} with capturable=True")
        raise ValueError(f"cuda_graphs needs an optimizer that can be captured, and {name} cannot; use SGD, or AdamW")
