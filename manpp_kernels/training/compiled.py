"""``torch.compile`` for local blocks: what each runs has code of its own."""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
from torch import nn

from manpp_kernels.local.network import LocalNetwork
from manpp_kernels.local.recompute import Recomputed

_networks = itertools.count()

# Backends that see a recomputed unit through AOTAutograd, which has it write its running statistics once. Others run
# its graph a second time as it is.
_RECOMPUTING = ("inductor", "aot_eager", "aot_eager_decomp_partition")


def check_backend(backend: str) -> None:
    """Raise ValueError where torch.compile has no such backend, of which it raises an error of its own kind, later."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"torch.compile has no backend {backend!r}; there are {', '.join(torch.compiler.list_backends())} and, for "
            "debugging, eager and aot_eager"
        )


def compile_blocks(network: LocalNetwork, backend: str, *, dynamic: bool | None) -> None:
    """Have the body and the auxiliary network of every block compiled when they first run.

    They are two functions, not one: what comes in between (a block hands on its features, and is given its effective
    weights) stays as it is, and so do their hooks.

    Args:
        network: whose blocks keep their modules, names and state.
        backend: of ``torch.compile``.
        dynamic: False compiles for every size anew, None for any size once a second one has come.

    Raises:
        ValueError: units that are recomputed would, compiled, not be computed as they are.
    """
    _check_recomputed(network, backend)
    number = next(_networks)
    for index, block in enumerate(network):
        for kind, module in (("body", block.body), ("auxiliary", block.auxiliary)):
            if module is not None:
                # A module's attribute of this kind is no part of its state, and is what it calls. Not by assignment,
                # which type checkers refuse for a method.
                compiled = _CompiledForward(module, f"{kind}_{number}_{index}", backend, dynamic)
                setattr(module, "forward", compiled)  # noqa: B010


def _recomputed(module: nn.Module) -> list[Recomputed]:
    return [m for m in module.modules() if isinstance(m, Recomputed)]


def _check_recomputed(network: LocalNetwork, backend: str) -> None:
    units = _recomputed(network)
    if not units:
        return
    if backend not in _RECOMPUTING:
        problem = f"by {' or '.join(_RECOMPUTING)} alone, not by {backend!r}"
    elif network.rule.overlapping:  # the second run of a unit writes running statistics that the first still needs
        problem = f"where blocks do not overlap, and those of rule={network.rule.name!r} do"
    elif any(unit.iterates for unit in units):  # PyTorch's compiler does not take it in there
        problem = "without spectral normalisation, and the model has some"
    else:
        return
    raise ValueError(f"units that are recomputed (activation checkpointing) can be compiled {problem}")


class _CompiledForward:
    """Stands in the place of ``module.forward``, in this instance alone; a copy of the module has its own, uncompiled.

    PyTorch keeps what it has compiled with the code object it came from: eight versions of it (``recompile_limit``),
    after which it compiles no more, and by its name the sizes that it has met there, of which it takes those that
    differ to differ from call to call. ``Module.compile`` would make all blocks one function: the ninth would run
    uncompiled, and the second be compiled for any size. So each gets a code object, and a name, of its own.
    """

    def __init__(self, module: nn.Module, name: str, backend: str, dynamic: bool | None) -> None:
        forward = module.forward

        def call(*args: Any) -> Any:
            return forward(*args)

        own = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
        self._module = module
        # Where a graph breaks inside a unit that is recomputed, the unit would run as it is, and write its running
        # statistics twice: an error then.
        self._compiled = torch.compile(own, backend=backend, dynamic=dynamic, fullgraph=bool(_recomputed(module)))

    def __call__(self, *args: Any) -> Any:
        return self._compiled(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self._module,)


def _plain_forward(module: nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)
