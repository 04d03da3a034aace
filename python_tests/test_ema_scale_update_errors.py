"""Every misuse of ``ema_scale_update`` is an exception of the fitting type that names its cause, and writes nothing."""

from __future__ import annotations

import re
from typing import Any

import misuse
import numpy as np
import pytest
import torch
from conftest import BACKENDS_ON_CPU
from misuse import EMA_SCALE_UPDATE as CASES
from misuse import negated, same_bytes, tensors_of, valid
from torch import Tensor

import manpp_kernels
from manpp_kernels import EmaPlan, ema_scale_update


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("case", CASES)
def test_misuse(case: str, backend: str) -> None:
    misuse.check_ema_scale_update(case, backend)


LATER = [
    *(name for name in CASES if name.startswith("momentum ")),
    *("scale a float", "scale of integers", "scale of two dimensions", "scale on another device"),
    *("bias without scale", "group out of an empty scale"),
]


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("case", LATER)
def test_misuse_of_a_later_update(case: str, backend: str) -> None:
    """What an update is given is looked at each time, not when the plan is built alone."""
    change, kind, message = CASES[case]
    arguments = valid()
    ema = arguments["ema"]
    plan = EmaPlan(ema, arguments["params"], bias=arguments["bias"], groups=[0, 1])
    before = [e.clone() for e in ema]
    change(arguments)
    with manpp_kernels.use_backend(backend):
        plan.update(1.0, torch.ones(2))
        with pytest.raises(kind) as error:
            plan.update(arguments["momentum"], arguments.get("scale"))
        with pytest.raises(IndexError, match=r"groups\[1\] is 1, and scale has 1"):
            plan.update(0.5, torch.ones(1))
    assert re.search(message, str(error.value)), str(error.value)
    assert all(map(torch.equal, ema, before))


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("case", CASES)
def test_misuse_of_a_plan(case: str, backend: str) -> None:
    """A plan says the same, when it is made or at its first update."""
    change, kind, message = CASES[case]
    arguments = valid()
    change(arguments)
    tensors = tensors_of(arguments)
    before = [t.detach().clone() for t in tensors]
    momentum, scale = arguments.pop("momentum"), arguments.pop("scale", None)
    with pytest.raises(kind) as error, manpp_kernels.use_backend(backend):
        EmaPlan(**arguments).update(momentum, scale)
    assert re.search(message, str(error.value)), str(error.value)
    for t, b in zip(tensors, before, strict=True):
        assert same_bytes(t, b)


def test_no_groups_for_some_tensors() -> None:
    ema, bias = [torch.ones(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match="groups has 0 entries and ema has 1"):
        ema_scale_update(ema, [torch.zeros(3)], 0.5, scale=torch.ones(()), bias=bias, groups=[])
    assert ema[0].tolist() == [1.0] * 3


def test_columns_of_one_matrix_under_another_default_device() -> None:
    matrix = torch.zeros(4, 2)
    with torch.device("meta"):
        ema_scale_update([matrix[:, 0]], [matrix[:, 1]], 0.5)


@pytest.mark.parametrize("backend", BACKENDS_ON_CPU)
@pytest.mark.parametrize("groups", [(0, 1), range(2), np.array([0, 1]), [np.int32(0), 1]], ids=repr)
def test_groups_of_other_types(groups: Any, backend: str) -> None:
    with manpp_kernels.use_backend(backend):
        expected = ema_scale_update(**valid())
        found = ema_scale_update(**(valid() | {"groups": groups}))
        iterated = ema_scale_update(**(valid() | {"groups": iter(groups)}))
        arguments = valid() | {"groups": groups}
        momentum, scale = arguments.pop("momentum"), arguments.pop("scale")
        planned = EmaPlan(**arguments).update(momentum, scale)
    for a, b, c, d in zip(expected, found, iterated, planned, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)


def test_the_arguments_do_work() -> None:
    assert len(ema_scale_update(**valid())) == 2


def test_elements_that_interleave_and_share_no_memory() -> None:
    memory = torch.zeros(8)
    ema = memory.as_strided((3, 2), (2, 3))  # in places 0, 3, 2, 5, 4 and 7
    ema_scale_update(ema, torch.ones(3, 2), 0.5)
    assert memory.tolist() == [0.5, 0, 0.5, 0.5, 0.5, 0.5, 0, 0.5]


def test_views_that_are_lazily_negated_are_read_as_what_they_are() -> None:
    arguments = valid() | {"params": [negated(), valid()["params"][1]], "bias": [negated(), valid()["bias"][1]]}
    arguments["scale"] = torch.randn(2, dtype=torch.complex64).conj().imag
    plain = {name: [t.clone() for t in value] for name, value in arguments.items() if name in ("ema", "params", "bias")}
    expected = ema_scale_update(**(arguments | plain | {"scale": arguments["scale"].clone()}))
    by_plan = arguments | {"ema": [e.clone() for e in arguments["ema"]]}
    del by_plan["momentum"], by_plan["scale"]
    plan = EmaPlan(**by_plan)
    momentum = torch.complex(torch.zeros(()), torch.tensor(-0.9)).conj().imag
    for found in (ema_scale_update(**arguments), plan.update(momentum, arguments["scale"])):
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b)


def test_transforms_of_torch_func_are_refused() -> None:
    def loss(p: Tensor) -> Tensor:
        ema_scale_update(torch.zeros(3), p.detach(), 0.9)
        return p.sum()

    with pytest.raises(RuntimeError, match=r"torch\.func sees no write in place"):
        torch.func.grad(loss)(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"torch\.func sees no write in place"):
        torch.func.vmap(loss)(torch.ones(2, 3))


@pytest.mark.parametrize("weights", [False, True])
def test_torch_jit_trace_is_refused_as_it_would_lose_the_update(weights: bool) -> None:
    ema, scale = torch.zeros(3), torch.ones(())

    def update(p: torch.Tensor) -> torch.Tensor:
        out = ema_scale_update([ema], [p], 0.5, **({"scale": scale, "bias": [p]} if weights else {}))
        return out[0] if out else p

    with pytest.warns(), pytest.raises(RuntimeError, match="trace does not record the update"):
        torch.jit.trace(update, torch.ones(3))
    assert not ema.any()


def test_ema_that_requires_grad_is_fine_under_no_grad() -> None:
    arguments = valid()
    arguments["ema"][0].requires_grad_()
    with torch.no_grad():
        ema_scale_update(**arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_that_differ() -> None:
    ema, params = torch.zeros(3), torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match=r"params\[0\] is on cuda:0, ema\[0\] on cpu"):
        ema_scale_update(ema, params, 0.5)
    # Pairs may lie on different devices, each pair on one.
    gpu = torch.zeros(3, device="cuda")
    ema_scale_update([ema, gpu], [torch.ones(3), params], 0.5)
    assert ema.tolist() == gpu.tolist() == [0.5] * 3


def test_a_device_that_cannot_be_served_is_seen_before_the_first_is_written() -> None:
    ema, params = [torch.zeros(3), torch.zeros(3, device="meta")], [torch.ones(3), torch.ones(3, device="meta")]
    with manpp_kernels.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for.*on meta"):
        ema_scale_update(ema, params, 0.5)
    assert not ema[0].any()


def test_transforms_of_torch_func_are_refused_before_anything_is_written() -> None:
    ema, params, bias = torch.randn(3, 1, 5).unbind()
    before = ema.clone()

    def loss(scale: Tensor) -> Tensor:
        return ema_scale_update(ema, params, 0.9, scale=scale, bias=bias)[0].sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(torch.ones(()))
    assert torch.equal(ema, before)
