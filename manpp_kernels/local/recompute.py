"""Activation checkpointing inside a local block: its units run once more in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import checkpoint

from manpp_kernels import backends


class Recomputed(nn.Module):
    """A unit that runs once more in the backward pass: activation checkpointing.

    Its batch normalisations count a batch once, though they see it twice; spectral normalisations begin their power
    iteration the second time where they began it the first; and random numbers are the same.

    Attributes:
        iterates: whether a forward pass of the unit moves vectors of a power iteration, of spectral normalisations.
        capturable: whether it may run inside a CUDA graph, which has no state of random numbers to go back to. A unit
            that draws some then raises RuntimeError in the steps before the capture.
    """

    capturable = False

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit
        self._norms = [m for m in unit.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._vectors = list(_power_iteration_vectors(unit))
        self.iterates = bool(self._vectors)

    def forward(self, x: Tensor) -> Tensor:
        # A unit with nothing to train, behind nothing to train, has no backward pass: it keeps nothing as it is.
        wanted = x.requires_grad or any(p.requires_grad for p in self.unit.parameters())
        if not (wanted and torch.is_grad_enabled()):
            return self.unit(x)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            # The form that the compiler takes in. AOTAutograd makes the running statistics that a unit writes a result
            # of the forward pass, so that the backward pass does not write them again; random numbers are the same.
            compiled: Tensor = checkpoint(self.unit, x, use_reentrant=False)
            return compiled
        # The reentrant form runs the unit once more by ordinary autograd, so that a meter of saved tensors sees what it
        # keeps. It asks for an input that requires grad, which that of a block's first unit does not.
        wants_grad = torch.empty(0, device=x.device, requires_grad=True)
        start = [getattr(m, name).clone() for m, name in self._vectors]
        with self._drawing_nothing(x.device) if self.capturable else nullcontext():
            result: Tensor = checkpoint(
                functools.partial(self._run, start),
                x,
                wants_grad,
                use_reentrant=True,
                preserve_rng_state=not self.capturable,
            )
        return result

    def _run(self, start: list[Tensor], x: Tensor, _: Tensor) -> Tensor:
        with self._uncounted(start) if torch.is_grad_enabled() else nullcontext():  # the second time
            return self.unit(x)  # type: ignore[no-any-return]

    @contextmanager
    def _uncounted(self, start: list[Tensor]) -> Iterator[None]:
        before = [(m, m.momentum, m.num_batches_tracked) for m in self._norms]
        vectors = [getattr(m, name) for m, name in self._vectors]
        for m in self._norms:
            m.momentum, m.num_batches_tracked = 0.0, None
        # In the place of the vectors themselves, which stay where this run's forward pass, or a later one, moved them.
        for (owner, name), value in zip(self._vectors, start, strict=True):
            setattr(owner, name, value)
        try:
            yield
        finally:
            for m, momentum, batches in before:
                m.momentum, m.num_batches_tracked = momentum, batches
            for (owner, name), value in zip(self._vectors, vectors, strict=True):
                setattr(owner, name, value)

    @contextmanager
    def _drawing_nothing(self, device: torch.device) -> Iterator[None]:
        if backends.is_capturing(device):  # by then, steps have shown it
            yield
            return
        before = _random_states(device)
        yield
        if any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True)):
            raise RuntimeError(
                f"a unit ({type(self.unit).__name__}) draws random numbers, such as dropout or stochastic depth, which "
                "a CUDA graph cannot draw the same when it recomputes: without them, or not both recompute (activation "
                "checkpointing) and cuda_graphs"
            )


def make_capturable(network: nn.Module) -> None:
    """Let every recomputed unit of ``network`` run inside a CUDA graph; see :class:`Recomputed`."""
    for module in network.modules():
        if isinstance(module, Recomputed):
            module.capturable = True


def _random_states(device: torch.device) -> list[Tensor]:
    """Those of the host's generator and the device's; no computation on the device."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _power_iteration_vectors(unit: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The buffers that a forward pass of a spectral normalisation moves, of both of PyTorch's kinds."""
    for m in unit.modules():
        names = ["_u", "_v"] if isinstance(m, parametrizations._SpectralNorm) else []
        for hook in m._forward_pre_hooks.values():
            names += [f"{hook.name}_u", f"{hook.name}_v"] if isinstance(hook, SpectralNorm) else []
        yield from ((m, name) for name in names if name in m._buffers)  # a vector is normalised without any
