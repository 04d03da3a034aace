"""Checkpoints that survive a kill and resume exactly, and exported weights.

A checkpoint is written beside its destination, flushed to the disk, and then renamed onto it, which the file system
does as a whole: at any moment the path holds the previous checkpoint or the new one. It is read back with
``weights_only=True``, so it runs no code. It holds everything a step depends on; the data order is held as the states
of the random number generators at the start of the epoch and now, with the number of batches in between.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import secrets
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_FORMAT = "manpp_kernels checkpoint"
_VERSION = 2


class CheckpointError(ValueError):
    """A file is not the checkpoint it should be; the message says what is wrong. Nothing was changed."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder; on leaving without an exception it becomes ``path`` as a whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp, whose files only their owner can read: weights are to be shared as the umask says.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a private file of its own in its place
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself has to reach the disk too
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_place(path: str | os.PathLike[str], what: str = "checkpoint") -> None:
    """Raise an OSError that says so where no file could be written to ``path``; its folder is made."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"no {what} can be written to {folder} ({error.strerror or error}); choose another folder, or make "
            "this one writable"
        ) from error


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, containers of them) atomically; NumPy's numbers become Python's.

    Raises:
        CheckpointError: it holds something that :func:`read` would refuse. The file is as it was.
        OSError: it cannot be written, as on a disk that is full. The file is as it was.
    """
    plain = {part: plain_numbers(value) for part, value in state.items()}
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": _FORMAT, "version": _VERSION, **plain}, temporary)
        except RuntimeError as error:  # which the writer makes of what the system says
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"{path} cannot be written: it may be that the disk is full, or too large a file") from error
        try:
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)  # of tensors, the names alone
        except pickle.UnpicklingError as error:
            parts = ", ".join(part for part, value in plain.items() if not _readable(value))
            raise CheckpointError(
                f"{path} is not written, as it could not be read again: the part {parts} holds other things than "
                "tensors, numbers and strings"
            ) from error


def plain_numbers(value: Any) -> Any:
    """``value`` with Python's numbers and strings in place of NumPy's, in dicts, lists and tuples too."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: plain_numbers(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_numbers(entry) for entry in value)
    return value


def _readable(value: Any) -> bool:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of :func:`write`, onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: the file is damaged, of another program, or of a version this package does not know.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises one of many types, by where the damage is
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this package: {_damage(path, error)}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was written by another program; it is no checkpoint of this package")
    if state.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has the version {state.get('version')}, and this release reads {_VERSION}; use the release that "
            "wrote it"
        )
    return state


def _damage(path: str | os.PathLike[str], error: Exception) -> str:
    """What is wrong with a file that PyTorch could not load, whose own words are about its settings."""
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        return "it is cut short, or of another kind"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other things than tensors, numbers and strings"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_tensors(what: str, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a state has other keys or shapes than it has to have."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing or extra:
        which = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which is not there"
        raise CheckpointError(f"the checkpoint is of another network: its part {what!r} {which}")
    for key, value in expected.items():
        if isinstance(value, Tensor) and (not isinstance(found[key], Tensor) or found[key].shape != value.shape):
            shape = tuple(found[key].shape) if isinstance(found[key], Tensor) else type(found[key]).__name__
            raise CheckpointError(
                f"the checkpoint is of another network: {key!r} of its part {what!r} has the shape {shape}, here it is "
                f"{tuple(value.shape)}"
            )


def loader_and_samplers(loader: Any) -> list[Any]:
    """What decides the order of an epoch: the loader, its samplers, and that of its batch sampler, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(owner): owner for owner in owners if owner is not None}.values())


def loader_generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader or its samplers draw the order of an epoch from, beside torch's global one."""
    found: dict[int, torch.Generator] = {}
    for owner in loader_and_samplers(loader):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def rng_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, of CUDA's, and of ``generators``."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        # Where a training on the CPU has not begun to use a GPU, looking would begin.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [g.get_state() for g in generators],
    }


def set_rng_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put the generators into a state of :func:`rng_state`.

    Raises:
        CheckpointError: the state has another number of ``generators``.
    """
    if len(state["generators"]) != len(generators):
        raise CheckpointError(
            f"the loader draws from {len(generators)} generators, and the checkpoint was written with one that draws "
            f"from {len(state['generators'])}; resume with the loader it was written with"
        )
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for g, s in zip(generators, state["generators"], strict=True):
        g.set_state(s)


@contextlib.contextmanager
def kept_rng_state(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """The generators are afterwards where they were before."""
    state = rng_state(generators)
    try:
        yield
    finally:
        set_rng_state(state, generators)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "exporting weights needs the package safetensors; install it, or use trainer.export_state_dict()"
        ) from error
    return safetensors.torch


def export_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the ``state_dict`` of ``model`` as a safetensors file, atomically.

    Raises:
        ImportError: safetensors is not installed.
        CheckpointError: the state holds more than tensors. Nothing was written.
    """
    library = _safetensors()
    others = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} is not written: {others[0]!r} of {type(model).__name__} is no tensor, and safetensors files hold "
            "nothing else; use torch.save(trainer.export_state_dict(), path)"
        )
    # Each tensor on its own memory: the format takes no views into a common storage.
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in model.state_dict().items()}
    with atomic_path(path) as temporary:
        library.save_file(tensors, temporary)


def import_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of :func:`export_weights` into ``model``.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or of another network; the model is as it was.
    """
    library = _safetensors()
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        tensors = library.load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    check_tensors("weights", tensors, model.state_dict())
    model.load_state_dict(tensors)
