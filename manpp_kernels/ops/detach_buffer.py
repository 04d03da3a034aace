"""``DetachBuffer``: preallocated boundary activations between two gradient-isolated blocks."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from manpp_kernels.backends import is_capturing
from manpp_kernels.ops.detach_copy import check_options, check_tensor, detach_copy


class _Fence:
    """A point in a CUDA stream that another stream can wait for; nothing on devices that have no streams.

    Work that is captured into a CUDA graph is left out: an event may not lead out of a capture or into it. There the
    captured streams give the order, which have to fork and join as in any capture, and between replays the stream that
    the graphs are launched on.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._event = torch.cuda.Event() if memory.is_cuda else None

    def record(self) -> None:
        """Everything that is enqueued on the current stream so far."""
        if self._event is not None and not is_capturing(self._memory.device):
            self._event.record(self._stream())

    def wait(self) -> None:
        """Lets the current stream wait for what was recorded; for nothing if that never happened."""
        if self._event is not None and not is_capturing(self._memory.device):
            self._event.wait(self._stream())

    def _stream(self) -> torch.cuda.Stream:
        """The current stream, on which the memory is about to be used or just was."""
        stream = torch.cuda.current_stream(self._memory.device)
        # For the day the memory is given back: the allocator knows of the stream it was allocated on alone.
        self._memory.record_stream(stream)
        return stream


class _Slot:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.value: Tensor | None = None  # what was put and not yet released
        self.taken = False
        self.number = 0  # of that put
        self.written, self.released = _Fence(memory), _Fence(memory)


class DetachBuffer:
    """A ring of preallocated activations that pass from a producing block to a consuming one, without a gradient.

    The two need not know of each other's streams, nor of each other's pace, as long as the ring has a free slot::

        buffer = DetachBuffer(slots=2)

        y = buffer.put(x)       # producer: a detached copy of x in the next slot, written on the current stream
        y = buffer.get()        # consumer: the oldest one not yet taken; the current stream waits for the write
        buffer.release(y)       # consumer: all that reads y, backward included, is enqueued on the current stream

    Where producer and consumer share a stream, ``get`` can be left away and the result of ``put`` used. ``put`` makes
    its stream wait until the slot's last reader is done. The host never waits. ``put``, ``get`` and ``release`` may be
    called from different threads.

    Memory is allocated at the first ``put`` (or by :meth:`reserve`) and its addresses stay, as CUDA graphs demand. A
    smaller batch, as the last of an epoch, takes the front of its slot. A graph that still needs what a slot held
    before raises in its backward pass, as after any in-place write.

    Args:
        slots: how many activations the ring holds.
        dtype: of the copies; that of the first activation if None, and then all have to be of it.
        memory_format: of the copies; the layout of the first activation if None.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: fewer slots than one.
    """

    def __init__(
        self, slots: int = 2, *, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
    ) -> None:
        if not isinstance(slots, int) or isinstance(slots, bool):
            raise TypeError(f"slots has to be an int, and is {type(slots).__name__}")
        if slots < 1:
            raise ValueError(f"slots has to be at least 1, and is {slots}")
        check_options(None, dtype, memory_format)
        self.slots, self.dtype, self.memory_format = slots, dtype, memory_format
        self._lock = threading.Lock()
        self._ring: list[_Slot] = []
        self._puts = 0

    @property
    def capacity(self) -> tuple[int, ...] | None:
        """The shape of a slot; None before anything is allocated."""
        return tuple(self._ring[0].memory.shape) if self._ring else None

    @property
    def in_use(self) -> int:
        """How many slots hold an activation that is not released."""
        return sum(slot.value is not None for slot in self._ring)

    def reserve(self, x: Tensor) -> None:
        """Allocate the slots for activations like ``x``, and no larger, in place of those there are.

        Raises:
            TypeError, ValueError: ``x`` is nothing :func:`manpp_kernels.detach_copy` takes.
            RuntimeError: a slot is in use.
        """
        with self._lock:
            self._reserve(x)

    def _reserve(self, x: Tensor) -> None:
        check_tensor("x", x)
        check_options(x, self.dtype, self.memory_format)
        if self.in_use:
            raise RuntimeError(f"{self.in_use} of {self.slots} slots are in use; release them before reserving anew")
        layout = torch.preserve_format if self.memory_format is None else self.memory_format
        with torch.inference_mode(False):  # a buffer first used in inference serves training, too
            like = torch.empty_like(x.detach(), dtype=self.dtype, memory_format=layout)
            self._ring = [_Slot(torch.empty_like(like)) for _ in range(self.slots)]
        for slot in self._ring:
            # The allocator orders new memory after its last use on this stream alone, and the first put may come on
            # another: that waits for this.
            slot.released.record()
        self._puts = 0

    def put(self, x: Tensor) -> Tensor:
        """Copy ``x`` out of its graph into the next slot, on the current stream.

        Args:
            x: of the shape of the first activation, or a smaller batch (dimension 0) of it; on the same device.

        Returns:
            The copy, in the slot; it does not require grad.

        Raises:
            RuntimeError: every slot is in use.
            TypeError: ``x`` is no tensor that can be copied, or of another dtype than the slots, without a ``dtype``
                asked for.
            ValueError: another shape or device, or a larger batch than the slots hold (see :meth:`reserve`).
        """
        with self._lock:
            if not self._ring:
                self._reserve(x)
            self._check(x)
            slot = self._ring[self._puts % self.slots]
            if slot.value is not None:
                raise RuntimeError(f"the next of {self.slots} slots is in use; release it, or take more slots")
            out = slot.memory[: x.shape[0]] if x.dim() else slot.memory
            slot.released.wait()
            slot.value = detach_copy(x, out.detach())
            slot.written.record()
            slot.taken, slot.number = False, self._puts
            self._puts += 1
            return slot.value

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x)
        memory = self._ring[0].memory
        if x.device != memory.device:
            raise ValueError(f"x is on {x.device}, and the slots are on {memory.device}")
        if x.dim() != memory.dim() or x.shape[1:] != memory.shape[1:]:
            raise ValueError(f"x has the shape {tuple(x.shape)}, and the slots {tuple(memory.shape)}")
        if x.dim() and x.shape[0] > memory.shape[0]:
            raise ValueError(
                f"x has a batch of {x.shape[0]}, and the slots hold {memory.shape[0]}: their addresses are fixed; "
                "call reserve() with the largest batch"
            )
        if self.dtype is None and x.dtype != memory.dtype:
            raise TypeError(f"x is {x.dtype}, and the slots are {memory.dtype}; give the buffer a dtype to cast to it")

    def get(self) -> Tensor:
        """The oldest activation that was not yet taken; the current stream waits until it is written.

        Raises:
            RuntimeError: there is none.
        """
        with self._lock:
            waiting = [slot for slot in self._ring if slot.value is not None and not slot.taken]
            if not waiting:
                raise RuntimeError("nothing was put into the buffer that is not taken yet")
            slot = min(waiting, key=lambda slot: slot.number)
            slot.taken = True
            slot.written.wait()
            assert slot.value is not None
            return slot.value

    def release(self, y: Tensor) -> None:
        """Give the slot of ``y`` back, once what has been enqueued on the current stream so far is done with it.

        Raises:
            ValueError: ``y`` is not in this buffer, or was released before.
        """
        with self._lock:
            for slot in self._ring:
                if slot.value is y:
                    slot.released.record()
                    slot.value = None
                    return
        raise ValueError(
            "y is not an activation of this buffer that is in use: pass what put() or get() returned, once"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a buffer with the same options, and empty."""
        return {"slots": self.slots, "dtype": self.dtype, "memory_format": self.memory_format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
