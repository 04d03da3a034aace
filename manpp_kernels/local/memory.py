"""Measured memory of a training step: live saved tensors on any device, the allocator's peak on CUDA."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from manpp_kernels.trainer import LocalTrainer


def _storage_key(t: Tensor) -> tuple[torch.device, int]:
    return t.device, t.untyped_storage().data_ptr()


class _Saved:
    """What autograd keeps in place of a saved tensor; its death is how the meter learns that autograd let go."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensorMeter:
    """Counts the bytes that autograd keeps alive for the backward pass, while used as a context manager.

    The measure is *live unique storages without parameters*: every tensor that an operation saves for its backward is
    counted by its whole storage, once however many operations save it, from the first time it is saved until autograd
    has freed the last one that refers to it. Storages of ``exclude`` (parameters, buffers, EMA copies) do not count, as
    they live whether or not there is a graph; effective weights, which are made anew in every step, do count. Graphs
    that were recorded before the block was entered are not seen.

    The hooks cost time, so do not time a step that is being measured.

    Args:
        exclude: tensors whose storages do not count.

    Attributes:
        live_bytes: what is alive now.
        peak_bytes: the most that was alive at once.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage_key(t) for t in exclude}
        self._uses: dict[tuple[torch.device, int], int] = {}
        self._hooks: Any = None
        self.live_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> SavedTensorMeter:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, t: Tensor) -> Any:
        key = _storage_key(t)
        size = t.untyped_storage().nbytes()
        if size == 0 or key in self._excluded:
            return t
        # Detached, as an operation that saves its own output would otherwise hold itself alive through it. While the
        # holder lives, so does the storage, and no other can take its address.
        holder = _Saved(t.detach())
        uses = self._uses.get(key, 0)
        self._uses[key] = uses + 1
        if uses == 0:
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(holder, self._release, key, size).atexit = False
        return holder

    @staticmethod
    def _unpack(saved: Any) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    def _release(self, key: tuple[torch.device, int], size: int) -> None:
        self._uses[key] -= 1
        if self._uses[key] == 0:
            del self._uses[key]
            self.live_bytes -= size


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step, in bytes.

    Attributes:
        saved_peak: the peak of live unique saved-tensor storages without parameters; see :class:`SavedTensorMeter`.
        saved_after: what was still alive after the step (0 unless something holds on to a graph).
        allocator_peak: on CUDA the caching allocator's peak over the step, everything included; None elsewhere.
        allocator_before: on CUDA what was allocated before the step; None elsewhere.
    """

    saved_peak: int
    saved_after: int
    allocator_peak: int | None = None
    allocator_before: int | None = None


def measure_step_memory(trainer: LocalTrainer, batch: tuple[Tensor, Tensor]) -> StepMemory:
    """Run one training step on ``batch`` and measure it. It is a real step: parameters and EMA change.

    A step that a CUDA graph replays (``cuda_graphs``) passes neither autograd nor the allocator by, and shows nothing:
    measure one of the first three.

    Args:
        trainer: the trainer to step.
        batch: images (N, ...) and targets, as for ``trainer.step``.
    """
    device = trainer.device
    before = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with SavedTensorMeter(trainer.persistent_tensors()) as meter:
        trainer.step(batch)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return StepMemory(meter.peak_bytes, meter.live_bytes, peak, before)


@contextlib.contextmanager
def saved_bytes_of(exclude: Iterable[Tensor]) -> Iterator[SavedTensorMeter]:
    """A meter for measuring what a forward pass saves: gradients are recorded inside, whatever the setting outside."""
    with torch.enable_grad(), SavedTensorMeter(exclude) as meter:
        yield meter
