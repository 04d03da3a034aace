"""``EmaPlan`` where tensors move, are freed, or are no longer what they were: never a write through a stale address."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import Target
from reference import assert_effective_weights, assert_ema_step, clones
from torch import nn

from manpp_kernels import EmaPlan, detach_copy, ema_scale_update


@pytest.mark.parametrize("which", ["ema", "params", "bias"])
@pytest.mark.parametrize("move", ["data", "data of another dtype", "transposed data", "set_", "resize_", "storage"])
def test_moved_storage(target: Target, which: str, move: str) -> None:
    """The old memory is kept, and has to stay as it is: an update must find the new one."""
    device = target.device
    lists = {name: [torch.randn(6, 6, device=device) for _ in range(3)] for name in ("ema", "params", "bias")}
    ema, params, bias = lists["ema"], lists["params"], lists["bias"]
    scale = torch.tensor(0.5, device=device)
    plan = EmaPlan(ema, params, bias=bias)
    plan.update(0.9, scale)
    moved = lists[which][1]
    stale = moved.detach()  # another tensor on the old memory
    frozen = stale.clone()
    new = torch.randn(6, 6, device=device)
    if move == "data":
        moved.data = new
    elif move == "data of another dtype":
        moved.data = new.half()
    elif move == "transposed data":
        moved.data = moved.data.t()  # the same address
    elif move == "set_":
        moved.set_(new)
    elif move == "resize_":
        moved.resize_(600, 600)
        moved.normal_()
        for name in lists:
            if name != which:
                lists[name][1].data = torch.randn(600, 600, device=device)
        stale = frozen  # resize_ gives the old memory back
    else:
        moved.untyped_storage().resize_(4 * 6000)
        stale = frozen
    for _ in range(2):
        before = clones(ema)
        weights = plan.update(0.75, scale)
        assert_ema_step(ema, before, params, 0.75)
        assert_effective_weights(weights, ema, bias, [0.5] * 3, 2.0)
    if move != "transposed data":
        assert torch.equal(stale, frozen)


@pytest.mark.parametrize("which", ["ema", "params", "bias"])
@pytest.mark.parametrize("change", ["dtype", "strides"])
def test_another_tensor_at_the_same_address(target: Target, which: str, change: str) -> None:
    """Of as many elements, and neither contiguous before nor after, or both: the address alone tells nothing."""
    lists = {name: [torch.randn(3, 6, 6, device=target.device)] for name in ("ema", "params", "bias")}
    if change == "strides":
        lists = {name: [t.transpose(1, 2)] for name, (t,) in lists.items()}
    ema, params, bias = lists["ema"], lists["params"], lists["bias"]
    scale = torch.tensor(0.5, device=target.device)
    plan = EmaPlan(ema, params, bias=bias)
    plan.update(0.9, scale)
    (t,) = lists[which]
    address = t.data_ptr()
    if change == "dtype":
        t.data = t.data.view(torch.bfloat16).view(-1)[:108].view(3, 6, 6)
        t.normal_()
    else:
        t.data = t.data.as_strided((3, 6, 6), (1, 18, 3))
    assert t.data_ptr() == address
    before = clones(ema)
    weights = plan.update(0.75, scale)
    assert_ema_step(ema, before, params, 0.75)
    assert_effective_weights(weights, ema, bias, [0.5], 2.0)


def test_every_tensor_is_watched(target: Target) -> None:
    ema, params, bias = ([torch.randn(6, device=target.device) for _ in range(3)] for _ in range(3))
    scale = torch.tensor(0.5, device=target.device)
    plan = EmaPlan(ema, params, bias=bias)
    plan.update(0.9, scale)
    for moved in (*ema, *params, *bias):
        moved.data = torch.randn(6, device=target.device)
        before = clones(ema)
        weights = plan.update(0.75, scale)
        assert_ema_step(ema, before, params, 0.75)
        assert_effective_weights(weights, ema, bias, [0.5] * 3, 2.0)


def test_moved_modules(target: Target) -> None:
    """``module.to`` and friends give every parameter new memory behind the plan's back."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(target.device)
    average = copy.deepcopy(model).requires_grad_(False)
    plan = EmaPlan(average.parameters(), model.parameters())
    moves = [
        lambda: model.to(torch.bfloat16),
        lambda: average.double(),
        lambda: model.to(memory_format=torch.channels_last),
        lambda: (average.to(memory_format=torch.channels_last), model.float()),
        lambda: torch.nn.utils.vector_to_parameters(torch.randn(186, device=target.device), model.parameters()),
    ]
    assert sum(p.numel() for p in model.parameters()) == 186
    for move in moves:
        move()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        before = clones(list(average.parameters()))
        plan.update(0.5)
        assert_ema_step(list(average.parameters()), before, list(model.parameters()), 0.5)


def test_a_shape_that_no_longer_fits_is_an_error(target: Target) -> None:
    ema, params = torch.ones(6, device=target.device), torch.zeros(6, device=target.device)
    plan = EmaPlan(ema, params)
    plan.update(1.0)
    for data in (torch.zeros(7, device=target.device), params.data[:5]):  # elsewhere, and at the same address
        params.data = data
        with pytest.raises(ValueError, match=re.escape(f"params[0] has the shape ({len(data)},), ema[0] (6,)")):
            plan.update(0.5)
        assert ema.tolist() == [1.0] * 6
    params.data = torch.zeros(6, device=target.device)
    plan.update(0.5)
    assert ema.tolist() == [0.5] * 6, "and the plan works again once it does"


def test_scale_and_momentum_in_an_ema(target: Target) -> None:
    """Which the update would change under them; noticed when they come, also after updates with others."""
    ema, params, bias = torch.ones(3, 8, device=target.device).unbind()
    plan = EmaPlan(ema, params, bias=bias)
    scale, momentum = torch.ones((), device=target.device), torch.full((), 0.5, device=target.device)
    for _ in range(2):
        plan.update(momentum, scale)
        with pytest.raises(ValueError, match=r"ema\[0\] overlaps scale in memory"):
            plan.update(momentum, ema[3])
        with pytest.raises(ValueError, match=r"ema\[0\] overlaps momentum in memory"):
            plan.update(ema[7], scale)
    assert ema.tolist() == [1.0] * 8


def test_a_scale_that_reaches_into_an_ema(target: Target) -> None:
    """By its last entry, into the last of them."""
    memory = torch.ones(8, device=target.device)
    ema, params = [torch.ones(6, device=target.device), memory[2:]], [torch.zeros(6, device=target.device)] * 2
    plan = EmaPlan(ema, params, bias=params, groups=[0, 2])
    plan.update(1.0, torch.ones(3, device=target.device))
    with pytest.raises(ValueError, match=r"ema\[1\] overlaps scale in memory"):
        plan.update(0.5, memory[:3])
    assert all(e.tolist() == [1.0] * 6 for e in ema)


def test_storage_that_came_to_overlap_is_an_error(target: Target) -> None:
    ema, params = torch.ones(6, device=target.device), torch.zeros(6, device=target.device)
    plan = EmaPlan(ema, params)
    params.data = ema.data
    with pytest.raises(ValueError, match=r"ema\[0\] overlaps params\[0\]"):
        plan.update(0.5)
    assert ema.tolist() == [1.0] * 6


def test_storage_that_was_freed_is_an_error(target: Target) -> None:
    """As sharded data parallelism does with parameters that are not in use."""
    ema, params = torch.ones(6, device=target.device), torch.zeros(6, device=target.device)
    plan = EmaPlan(ema, params)
    plan.update(0.5)
    params.untyped_storage().resize_(0)
    for update in (lambda: plan.update(0.5), lambda: ema_scale_update(ema, params, 0.5)):
        with pytest.raises(ValueError, match=r"params\[0\].*memory"):
            update()
    scale = torch.ones((), device=target.device)
    with pytest.raises(ValueError, match=r"bias\[0\] has no memory"):
        ema_scale_update(ema, ema.clone(), 0.5, scale=scale, bias=params)
    assert ema.tolist() == [0.5] * 6


def test_a_view_of_storage_that_was_freed_is_an_error(target: Target) -> None:
    """Whose address is not 0 then, as of the views of a flat parameter."""
    flat = torch.ones(100, device=target.device)
    ema, params = flat[50:], torch.zeros(50, device=target.device)
    plan = EmaPlan(ema, params)
    plan.update(0.5)
    flat.untyped_storage().resize_(0)
    for update in (
        lambda: plan.update(0.5),
        lambda: ema_scale_update(ema, params, 0.5),
        lambda: ema_scale_update(params, ema, 0.5),
        lambda: detach_copy(params, ema),
        lambda: detach_copy(ema, params),
    ):
        with pytest.raises(ValueError, match="has no memory"):
            update()
    assert params.tolist() == [0.0] * 50


def test_scale_and_momentum_that_were_freed_are_errors(target: Target) -> None:
    ema, params = torch.ones(6, device=target.device), torch.zeros(6, device=target.device)
    scale, momentum = torch.ones((), device=target.device), torch.full((), 0.5, device=target.device)
    plain, weighted = EmaPlan(ema, params), EmaPlan(ema, params, bias=params.clone())
    plain.update(momentum)
    weighted.update(0.5, scale)
    for t in (scale, momentum):
        t.untyped_storage().resize_(0)
    for update in (
        lambda: plain.update(momentum),
        lambda: weighted.update(0.5, scale),
        lambda: ema_scale_update([ema], [params], momentum),
        lambda: ema_scale_update([ema], [params], 0.5, scale=scale, bias=[params.clone()]),
    ):
        with pytest.raises(ValueError, match=r"(scale|momentum) has no memory"):
            update()
    assert ema.tolist() == [0.25] * 6


@pytest.mark.parametrize("how", ["freed", "moved"])
def test_effective_weights_in_other_memory(target: Target, how: str) -> None:
    ema, params, bias = (torch.full((6,), float(i), device=target.device) for i in range(3))
    plan = EmaPlan(ema, params, bias=bias)
    scale = torch.ones((), device=target.device)
    plan.update(0.5, scale)
    assert plan.weights is not None
    if how == "freed":
        plan.weights[0].untyped_storage().resize_(0)
    else:
        plan.weights[0].data = torch.zeros(6, device=target.device)
    found = plan.update(0.5, scale)
    assert found is not None
    assert found[0].tolist() == [2.75] * 6


def test_params_that_are_lazily_negated(target: Target) -> None:
    """Their value is read at each update, and not that of a copy that was made for the first."""
    z = torch.complex(torch.arange(6.0), torch.arange(6.0)).to(target.device)
    params = z.conj().imag
    assert params.is_neg()
    ema, scale = torch.zeros(6, device=target.device), torch.ones((), device=target.device)
    plan = EmaPlan(ema, params, bias=params)
    for factor in (1, 3):
        z.mul_(factor)
        found = plan.update(0.0, scale)
        assert torch.equal(ema, params)
        assert found is not None
        assert torch.equal(found[0], 2 * params)


@pytest.mark.parametrize("which", ["ema", "params", "bias", "scale", "momentum"])
def test_an_input_that_comes_to_lie_in_the_weights(target: Target, which: str) -> None:
    """As where trained weights are baked into a parameter: an update would write what it reads."""
    device = target.device
    ema, params, bias = ([torch.rand(8, device=device) for _ in range(2)] for _ in range(3))
    scale, momentum = torch.tensor(0.5, device=device), torch.tensor(0.75, device=device)
    plan = EmaPlan(ema, params, bias=bias)
    weights = plan.update(momentum, scale)
    assert weights is not None
    if which == "scale":
        scale = weights[0][0]
    elif which == "momentum":
        momentum = weights[0][0]
    else:
        {"ema": ema, "params": params, "bias": bias}[which][0].data = weights[0]
    before = clones(ema)
    read = clones([*params, *bias, scale, momentum])
    after = plan.update(momentum, scale)
    assert_ema_step(ema, before, params, float(read[-1]))
    assert_effective_weights(after, ema, bias, [float(read[-2])] * 2, 2.0)
    for t, value in zip((*params, *bias, scale, momentum), read, strict=True):
        assert torch.equal(t, value)
