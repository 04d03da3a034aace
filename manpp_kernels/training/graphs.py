"""A training step as a CUDA graph: the host launches it in one go, in place of each of its operations.

A local block is a network of its own, with a forward and a backward pass, and small ones are done before the host has
launched the next. A graph holds the launches of a whole step, at addresses and with numbers that do not change.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.training.step import StepResult

Compute = Callable[[Tensor, Tensor], StepResult]


class Device:
    """How a GPU runs, captures and replays; a test puts another in its place.

    Attributes:
        graph_bytes: what the graph has taken from the allocator for itself. Replays use it without the allocator's
            seeing, and on several streams at once, so that the peak while capturing says less.
        peak_bytes: that, with all that lay there before.
    """

    def __init__(self, device: torch.device) -> None:
        self.graph_bytes = self.peak_bytes = 0
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, call: Callable[[], Any]) -> Any:
        """Run on the stream that captures, so that what libraries and autograd set up for a stream is there by then."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return call()
        finally:
            current.wait_stream(self._stream)

    def capture(self, call: Callable[[], Any]) -> Any:
        """Record what ``call`` launches, of which nothing runs yet; what it returns is filled by every replay."""
        self.forget()
        gc.collect()
        torch.cuda.synchronize(self._stream.device)
        torch.cuda.empty_cache()  # memory that is free outside of a graph is of no use inside
        graph, device = torch.cuda.CUDAGraph(), self._stream.device
        lies, taken = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        # Not by torch.cuda.graph, which after an error leaves its stream the current one. Only this thread's calls are
        # watched: that of a loader that pins memory may make any.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = call()
            except BaseException:
                # The stream would stay in the capture: memory that does not suffice is no reason for that.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graph = graph
        self.graph_bytes = torch.cuda.memory_reserved(device) - taken
        self.peak_bytes = lies + self.graph_bytes
        return result

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def forget(self) -> None:
        self._graph = None


class StepGraph:
    """Runs the first steps as they are, then captures one and replays it.

    A batch of another shape, as the last one of an epoch, runs as it is. A step is captured anew where learning rates
    have changed, as from one epoch to the next, and after a warm-up where anything else has: a tensor has moved, as
    when a checkpoint is loaded, or another number of an optimizer is another. Numbers that modules keep on the host,
    such as a dropout's odds, are those of the capture.

    Args:
        compute: a whole step on images and targets, from dropping the gradients to the optimizer. What it does has to
            depend on tensors alone, and it must not wait for the device.
        modules: whose parameters and buffers it works on.
        optimizers: those it steps.
        device: where it runs.
    """

    WARM_UP = 3  # steps of a shape before one is captured: the optimizer's state, the plans, the libraries' choices

    def __init__(
        self,
        compute: Compute,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        device: Device,
    ) -> None:
        self._compute, self._optimizers, self._device = compute, optimizers, device
        # Where the tensors are registered: a replaced one shows there, and going through the modules takes longer.
        every = [m for module in modules for m in module.modules()]
        self._places = [place for m in every for place in (m._parameters, m._buffers) if place]
        self.forget()

    def forget(self) -> None:
        """Start over, with a warm-up."""
        self._device.forget()
        self._seen: Counter[object] = Counter()
        self._layout: object = None
        self._state: object = None
        self._rates: object = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None

    @property
    def peak_bytes(self) -> int:
        """The memory of a replayed step, with all that lies there beside it; 0 where nothing is captured."""
        return self._device.peak_bytes if self._outputs is not None else 0

    @property
    def graph_bytes(self) -> int:
        """What of it is the captured step's own: activations, gradients, results; 0 where nothing is captured."""
        return self._device.graph_bytes if self._outputs is not None else 0

    def step(self, images: Tensor, targets: Tensor) -> StepResult:
        """One step; the result's tensors are the caller's own."""
        if self._state is not None and self._state != self._watched():
            self.forget()
        layout = tuple((t.shape, t.stride(), t.dtype) for t in (images, targets))
        if self._layout is None and self._seen[layout] >= self.WARM_UP:
            self._layout = layout
        if layout != self._layout:
            self._seen[layout] += 1
            losses, logits = self._device.run(lambda: self._call(images, targets))
            if self._outputs is None:
                # What comes to be changed before the capture would be made anew by every replay, like a momentum.
                self._state = self._watched()
            return StepResult(list(losses.unbind()), logits, targets)
        rates = [_number(group["lr"]) for group in _groups(self._optimizers)]
        if self._outputs is None or rates != self._rates:
            self._capture(images, targets)
            self._state, self._rates = self._watched(), rates
        assert self._inputs is not None
        assert self._outputs is not None
        self._inputs[0].copy_(images)
        self._inputs[1].copy_(targets)
        self._device.replay()
        losses, logits = (t.clone() for t in self._outputs)
        return StepResult(list(losses.unbind()), logits, targets)

    def _call(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        result = self._compute(images, targets)
        assert result.logits is not None  # one process has the last block
        return torch.stack(result.losses), result.logits

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        check_capturable(self._optimizers)
        if self._inputs is None:
            self._inputs = torch.empty_like(images), torch.empty_like(targets)
        inputs = self._inputs
        # Results and gradients lie in the memory of the graph before, which makes room for this one.
        self._outputs = None
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        try:
            self._outputs = self._device.capture(lambda: self._call(*inputs))
        except BaseException as error:
            self.forget()
            if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(
                f"this training step cannot be captured in a CUDA graph ({str(error).splitlines()[0]}). No tensor of "
                "the training has changed, but CUDA is not to be used further in this process: continue in another, "
                "with cuda_graphs=False"
            ) from error

    def _watched(self) -> object:
        """What a captured step depends on beside the values of tensors and learning rates."""
        tensors = [t for place in self._places for t in place.values() if t is not None]
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        return (
            [t.data_ptr() for t in tensors],
            [t.requires_grad for t in tensors],
            [t.data_ptr() for state in states for t in state.values() if isinstance(t, Tensor)],
            [
                [(key, _number(value)) for key, value in group.items() if key not in ("params", "lr")]
                for group in _groups(self._optimizers)
            ],
        )


def make_step_graph(
    compute: Compute, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], device: torch.device
) -> StepGraph:
    """A :class:`StepGraph` for a GPU.

    Raises:
        ValueError: an optimizer cannot be captured.
    """
    check_capturable(optimizers)
    return StepGraph(compute, modules, optimizers, Device(device))


def check_device(device: torch.device) -> None:
    """Raise where a device has no graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, and the model is on {device}")


def check_capturable(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise where a step of an optimizer depends on numbers of its own on the host, which a graph would repeat."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.SGD):
            on_device = [
                key
                for group in optimizer.param_groups
                for key, value in group.items()
                if isinstance(value, Tensor) and value.device.type != "cpu"
            ]
            if on_device:
                raise ValueError(f"cuda_graphs needs {on_device[0]} of {name} to be a number, not a tensor on a device")
        elif not all(group.get("capturable") for group in optimizer.param_groups):
            if "capturable" in optimizer.defaults:
                raise ValueError(
                    f"cuda_graphs needs an optimizer that can be captured: make {name} with capturable=True (a "
                    "checkpoint brings back the setting that it was saved with)"
                )
            raise ValueError(
                f"cuda_graphs needs an optimizer that can be captured, and {name} cannot: take SGD or AdamW"
            )


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    for optimizer in optimizers:
        yield from optimizer.param_groups


def _number(value: Any) -> str:
    """A number as a captured step has it written into it; a tensor on the device is read at every replay instead."""
    if isinstance(value, Tensor):
        return repr(value.tolist()) if value.device.type == "cpu" else f"at {value.data_ptr()}"
    return f"({', '.join(map(_number, value))})" if isinstance(value, tuple | list) else repr(value)
