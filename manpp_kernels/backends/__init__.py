"""Which backend runs an operator: what is there, what is asked for, and why another cannot run.

==========  =============================================  =====================================================
backend     runs on                                        what it is
==========  =============================================  =====================================================
``cuda``    NVIDIA GPUs, compute capability 8.0 and up     csrc/cuda, compiled by nvcc
``triton``  NVIDIA and AMD GPUs; the CPU, interpreted      the same operators where no compiler is installed
``cpu``     x86-64 and Arm                                 csrc/cpu, vectorised, on libtorch's thread pool
``eager``   every device PyTorch has                       plain PyTorch, the readable reference
==========  =============================================  =====================================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator

import torch

BACKENDS = ("cuda", "triton", "cpu", "eager")

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _load_compiled() -> tuple[bool, bool, str]:
    """Load the compiled operators; returns (has CPU, has CUDA, why not)."""
    try:
        compiled = importlib.import_module("manpp_kernels._C")
    except ModuleNotFoundError:
        return False, False, "was not built"
    except ImportError as error:
        return False, False, f"did not load ({error})"
    return True, bool(compiled.cuda_architectures()), ""


CPU_COMPILED, CUDA_COMPILED, LOAD_ERROR = _load_compiled()
# The operators' library serves every version of Python, that of launch plans the one it was compiled for.
PLANS_COMPILED = CPU_COMPILED and importlib.util.find_spec("manpp_kernels._plan") is not None


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str) -> str:
    """Why ``backend`` cannot run here, in one sentence; an empty string where it can."""
    if backend not in BACKENDS:
        return f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}"
    return _REASONS[backend]()


def _why_not_cuda() -> str:
    if not CPU_COMPILED:
        return _why_not_cpu()
    if not CUDA_COMPILED:
        return "the compiled library was built without CUDA; install nvcc and reinstall with MANPP_CUDA=on"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if not runs_on(importlib.import_module("manpp_kernels._C").cuda_architectures(), capability):
        number = ".".join(map(str, capability))
        return f"the compiled library has no code for this GPU; reinstall with TORCH_CUDA_ARCH_LIST={number}"
    return ""


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, as in "sm_80,compute_90", runs on a GPU of this compute capability.

    Machine code (sm) runs on GPUs of its major number and its minor one or a higher; what is to be compiled by the
    driver (compute) on any that is as new; either on that GPU alone where its name ends in a letter.
    """
    for name in filter(None, architectures.split(",")):
        kind, number = name.split("_")
        exact = not number.isdigit()
        made_for = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
        same_major = made_for[0] == capability[0]
        if made_for == capability or (made_for <= capability and not exact and (same_major or kind == "compute")):
            return True
    return False


def _why_not_triton() -> str:
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not triton_interpreted():
        return (
            "PyTorch sees no GPU; set TRITON_INTERPRET=1 before the first import of triton to interpret it on the CPU"
        )
    return ""


def _why_not_cpu() -> str:
    if not CPU_COMPILED:
        return f"the compiled library {LOAD_ERROR}; reinstall manpp-kernels where a C++ compiler is found"
    return ""


_REASONS = {"cuda": _why_not_cuda, "triton": _why_not_triton, "cpu": _why_not_cpu, "eager": lambda: ""}


def available() -> list[str]:
    """The backends that can run here, fastest first."""
    return [name for name in BACKENDS if not why_not(name)]


def _checked(backend: str, source: str) -> str:
    reason = why_not(backend)
    if reason:
        kind = RuntimeError if backend in BACKENDS else ValueError
        raise kind(f"{source}: backend {backend!r} cannot run: {reason}")
    return backend


# One choice for the whole process, not for a thread: the backward pass runs on threads of autograd's own, and has to
# see the same backend as the forward pass did.
_override: str | None = None


def _from_environment() -> str | None:
    return _read_environment()


# As torch.compiler.assume_constant_result does, which would import the compiler: what is read once is not to be traced.
_from_environment._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _read_environment() -> str | None:
    """What MANPP_BACKEND says.

    Read at the first operator call rather than at import, so that a wrong value is an error where it matters and
    ``manpp doctor`` can still start and explain it.
    """
    asked = os.environ.get("MANPP_BACKEND", "")
    return _checked(asked, "MANPP_BACKEND") if asked else None


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend, in the whole process.

    Args:
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"eager"``. Takes precedence over the environment variable
            ``MANPP_BACKEND``, which chooses a backend for a whole run and is read once.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: this backend cannot run here; the message says why.
    """
    global _override
    _checked(backend, "use_backend")
    before = _override
    _override = backend
    try:
        yield
    finally:
        _override = before


def override(device: torch.device) -> str | None:
    """The backend asked for, checked against ``device``; None to let the dispatcher pick by device."""
    asked = _override
    if asked is None:
        asked = _from_environment()
        if asked is None:
            return None
    if asked in ("cpu", "cuda") and device.type != asked:
        raise RuntimeError(f"backend {asked!r} was asked for, and the tensors are on {device}")
    if asked == "triton" and device.type == "cpu" and not triton_interpreted():
        raise RuntimeError("backend 'triton' was asked for, and the tensors are on cpu: it needs TRITON_INTERPRET=1")
    return asked


def selected(device: torch.device) -> str:
    """The name of the backend that an operator called now on ``device`` runs on."""
    asked = override(device)
    if asked is not None:
        return asked
    if device.type == "cpu":
        return "cpu" if CPU_COMPILED else "eager"
    if device.type == "cuda":
        return "cuda" if CUDA_COMPILED else "triton" if TRITON_INSTALLED else "eager"
    return "eager"


def compiled_for(t: torch.Tensor) -> bool:
    """Whether :func:`selected` would be the compiled library's for the device of ``t``, told faster."""
    asked = override(t.device)
    if asked is not None:
        return asked in ("cpu", "cuda")
    return (CPU_COMPILED and t.is_cpu) or (CUDA_COMPILED and t.is_cuda)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):  # PyTorch asks the current stream of the current device
        return torch.cuda.is_current_stream_capturing()


_kept_for_graphs: dict[int, torch.Tensor] = {}


def keep_for_graphs(t: torch.Tensor) -> None:
    """Keep what a graph reads at every replay, for good: nothing says when a graph ends."""
    _kept_for_graphs.setdefault(t.data_ptr(), t)


def keep_while_used(t: torch.Tensor) -> None:
    """Keep the memory of ``t`` for what is launched on its device now, whoever lets go of ``t`` meanwhile.

    The allocator would hand it out without regard to any stream but the one that it was allocated on.
    """
    if is_capturing(t.device):
        keep_for_graphs(t)
    elif t.is_cuda:
        t.record_stream(torch.cuda.current_stream(t.device))
