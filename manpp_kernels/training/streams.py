"""Local blocks beside each other on a GPU: a block begins when the one before hands on its features.

What that one has left to do (its auxiliary network, its backward pass, its EMA and optimizer step) nobody has to wait
for. Small kernels leave most of a GPU idle; those of several blocks fill it, as the one long chain of end-to-end
backpropagation cannot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manpp_kernels.local.block import each
from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.ops.detach_copy import detach_copy


class OneLane:
    """The blocks one after the other, where the caller is. The interface of :class:`Streams`."""

    def step(self) -> contextlib.AbstractContextManager[None]:
        """Around all blocks of a step: they begin after what came before it, and are done before what comes after."""
        return contextlib.nullcontext()

    def block(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Around what block ``index`` has to do."""
        return contextlib.nullcontext()

    def take(self, index: int, x: Any) -> Any:
        """What block ``index`` takes, once it is there."""
        return x


class Streams(OneLane):
    """The blocks in turn on ``count`` CUDA streams; autograd runs a backward pass where its forward pass ran.

    A block takes a copy of the features it works on, so that nothing but a copy waits for another stream. The allocator
    gives memory that a block has done with to later blocks on the same stream alone: more streams take more of it.

    Args:
        network: whose blocks share no trained parameters.
        count: of streams; more than there are blocks are of no use.
        device: a CUDA device.
        shared: modules that every block calls, as the criterion.

    Raises:
        ValueError: blocks would change a tensor that others work with.
    """

    def __init__(
        self, network: LocalNetwork, count: int, device: torch.device, shared: Sequence[nn.Module] = ()
    ) -> None:
        network.rule.check_apart(count, pipeline=False)
        _check_apart(network)
        self._shared = [b for module in shared for b in module.buffers()]
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(min(count, len(network)))]
        self._handed_on: dict[int, torch.cuda.Event] = {}
        for index, block in enumerate(network):
            if block.auxiliary is not None:
                block.body.register_forward_hook(lambda *_, index=index: self._hand_on(index))

    def _hand_on(self, index: int) -> None:
        self._handed_on[index] = torch.cuda.current_stream(self._device).record_event()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        versions = [b._version for b in self._shared]
        for stream in self._streams:
            stream.wait_stream(current)
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a capture that has failed, for the reason that is on its way
                self._join(current)
            raise
        self._join(current)
        if versions != [b._version for b in self._shared]:
            raise ValueError("the criterion changes a buffer, which blocks at once cannot share; set streams=1")

    def _join(self, current: torch.cuda.Stream) -> None:
        for stream in self._streams:
            current.wait_stream(stream)

    def block(self, index: int) -> contextlib.AbstractContextManager[None]:
        return torch.cuda.stream(self._stream(index))

    def take(self, index: int, x: Any) -> Any:
        if index == 0:
            return x
        stream = self._stream(index)
        stream.wait_event(self._handed_on[index - 1])
        x = each(detach_copy, x)
        # Behind this wait, which comes after all that it has to do by now, the stream before may use the memory of its
        # features again. (Tensor.record_stream would keep that until the end of a capture.)
        self._stream(index - 1).wait_event(stream.record_event())
        return x

    def _stream(self, index: int) -> torch.cuda.Stream:
        return self._streams[index % len(self._streams)]


def make_lanes(
    network: LocalNetwork, streams: int, device: torch.device, *, shared: Sequence[nn.Module] = ()
) -> OneLane:
    """Where the blocks of ``network`` run, on a number of streams; ``shared`` are modules that every block calls.

    Raises:
        ValueError: blocks would change a tensor that others work with.
    """
    return Streams(network, streams, device, shared) if streams > 1 and len(network) > 1 else OneLane()


def _check_apart(network: LocalNetwork) -> None:
    """Raise where two blocks have a buffer in common, as that of a batch normalisation used twice."""
    owner: dict[Tensor, int] = {}
    for index, block in enumerate(network):
        for name, buffer in block.named_buffers():
            if owner.setdefault(buffer, index) != index:
                raise ValueError(
                    f"blocks {owner[buffer]} and {index} share the buffer {name}, so that they cannot run at once; set "
                    "streams=1"
                )
