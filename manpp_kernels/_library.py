"""The operator namespace ``torch.ops.manpp_kernels`` and the compiled library behind it.

A schema is defined here once, in Python, so that the operators exist where nothing was compiled. The dispatcher then
picks an implementation by the device of the tensors: the compiled library registers itself for CPU and CUDA when it
loads, Triton stands in on CUDA where the library was built without it, and plain PyTorch serves every other device.

Each operator also has the overloads ``.eager`` and ``.triton``, with the same schema, which is how
:func:`manpp_kernels.use_backend` asks for one implementation by name and how a compiled graph records that choice.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from manpp_kernels import backends

library = torch.library.Library("manpp_kernels", "DEF")  # lives as long as the package


class Operator:
    """One operator: its schema, the implementations registered for it, and the choice among them at a call."""

    def __init__(self, name: str, signature: str, *, fake: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self.name = name
        for overload in ("", ".eager", ".triton"):
            library.define(f"{name}{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"manpp_kernels::{name}{overload}", fake, lib=library)
        for overload in ("", ".eager"):
            library.impl(f"{name}{overload}", eager, "CompositeExplicitAutograd")
        library.impl(f"{name}.triton", self._triton, "CompositeExplicitAutograd")
        if not backends.CUDA_COMPILED and backends.TRITON_INSTALLED:
            library.impl(name, self._triton, "CUDA")
        packet = getattr(torch.ops.manpp_kernels, name)
        written = [i for i, a in enumerate(packet.default._schema.arguments) if a.is_write]
        for overload in (packet.default, packet.eager, packet.triton) if written else ():
            library.impl(
                overload, functools.partial(_tell_autograd, overload, written), "ADInplaceOrView", with_keyset=True
            )
        self._by_backend = {
            None: packet.default,
            "cpu": packet.default,
            "cuda": packet.default,
            "triton": packet.triton,
            "eager": packet.eager,
        }

    def _triton(self, *args: Any, **kwargs: Any) -> Any:
        # Imported at the first call: Triton takes most of a second to import, and most sessions never need it.
        return getattr(importlib.import_module("manpp_kernels.backends.triton"), self.name)(*args, **kwargs)

    def __call__(self, device: torch.device, *args: Any) -> Any:
        """Run the operator on tensors of ``device``, by the backend in force."""
        return self._by_backend[backends.override(device)](*args)

    def overloads(self) -> list[torch._ops.OpOverload]:
        """Every overload, for registering one autograd formula on all of them."""
        return list(dict.fromkeys(self._by_backend.values()))


def _tell_autograd(overload: Any, written: list[int], keyset: Any, *args: Any) -> Any:
    """Run an operator, and count its writes: a graph that has saved a tensor must know that it is another by now.

    Here and not around the call, so that the graph of a compiled function knows, too.
    """
    for i in written:
        if isinstance(args[i], Tensor) or args[i]:
            torch.autograd.graph.increment_version(args[i])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


def checked_operator(name: str, signature: str, *, declined: Any) -> Callable[..., Any]:
    """An operator of the compiled library alone, which checks its arguments itself, for calls outside any graph.

    In Python the checks of an operator take longer than its work on small tensors. What is not plain, or wrong, is left
    to the public function, which has to see to it that :func:`compiled_serves`: the operator then writes nothing and
    returns ``declined``.
    """
    library.define(f"{name}{signature}")
    # Past autograd: a write in place would ask its leave, and a detached alias of every tensor takes longer than that.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    # Views that are lazily negated, of which the memory is not the value, and ZeroTensors, which have none.
    library.impl(name, lambda *_: declined, "Negative")
    library.impl(name, lambda *_: declined, "ZeroTensor")
    # What an overload calls when it is called, which takes a third of a microsecond less.
    call: Callable[..., Any] = getattr(torch.ops.manpp_kernels, name).default._op
    return call


_modes, _transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state  # by torch.jit, which takes no operator that returns a bool
_forward_ad = torch.autograd.forward_ad
_included, _PRE_DISPATCH = torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is under way, in compiled code or not."""
    # By its type: to a function that torch.compile traces, what there is none of `is not None` all the same.
    return type(_transform()) is not NoneType


def transformed() -> bool:
    """Whether a transform of ``torch.func``, or forward-mode differentiation, is under way, in compiled code or not.

    Of these an operator knows nothing, and PyTorch would take its derivative for zero: plain PyTorch has to serve.
    """
    # in_transform(), without the call: this is asked at every call of an operator.
    return type(_transform()) is not NoneType or _forward_ad._current_level >= 0


PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its elements elsewhere


def undisturbed() -> bool:
    """Whether no mode and no transform wants a say in what is called."""
    # Of the modes, those that trace a function before it reaches autograd are kept elsewhere.
    return not _modes() and not transformed() and _tracing() is None and not _included(_PRE_DISPATCH)


def compiled_serves(first: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Whether a compiled backend may have these tensors as they are: :func:`undisturbed`, and all of them plain.

    False where ``first``, whose device counts, is empty.
    """
    if not undisturbed() or not PLAIN.issuperset(map(type, first)):
        return False
    for tensors in others:
        if not PLAIN.issuperset(map(type, tensors)):
            return False
    return len(first) > 0 and backends.compiled_for(first[0])
