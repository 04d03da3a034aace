"""``ema_multi_avg_fn`` in PyTorch's ``AveragedModel``, beside PyTorch's own ``get_ema_multi_avg_fn``."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from conftest import Target
from ema_models import Net, change
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manpp_kernels import ema_multi_avg_fn


def side_by_side(model: nn.Module, decay: float = 0.9, **options: Any) -> tuple[AveragedModel, AveragedModel]:
    return (
        AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(decay), **options),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), **options),
    )


def assert_same(ours: nn.Module, theirs: nn.Module, tolerance: float = 2e-6) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_beside_pytorchs(target: Target, decay: float, use_buffers: bool) -> None:
    model = Net().to(target.device)
    model.register_buffer("count", torch.tensor(10, device=target.device))
    if use_buffers:
        del model.mask  # PyTorch's own cannot average a boolean buffer
    ours, theirs = side_by_side(model, decay, use_buffers=use_buffers)
    for step in range(8):
        change(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same(ours, theirs)
    assert ours.n_averaged.item() == 8


def test_buffers_that_share_memory(target: Target) -> None:
    """One after the other, as PyTorch's own does on a CPU (on a GPU its one launch for both is a race)."""
    model = Net().to(target.device)
    base = torch.randn(11, device=target.device)
    model.register_buffer("first", base[1:])
    model.register_buffer("second", base[:-1])
    del model.mask

    def one_by_one(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        for a, c in zip(averaged, current, strict=True):
            get_ema_multi_avg_fn(0.5)([a], [c], count)

    ours = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.5), use_buffers=True)
    theirs = AveragedModel(model, multi_avg_fn=one_by_one, use_buffers=True)
    for step in range(8):
        change(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(target: Target, dtype: torch.dtype) -> None:
    model = nn.Linear(30, 20).to(target.device, dtype)
    ours, theirs = side_by_side(model, 0.75)
    for step in range(4):
        change(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same(ours, theirs, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_parameters_that_require_grad_while_gradients_are_recorded(target: Target, rounding: Any) -> None:
    ema = [nn.Parameter(torch.ones(5, device=target.device)), nn.Parameter(torch.ones(2, 3, device=target.device))]
    params = [torch.full_like(e, 3.0) for e in ema]
    expected = [e.detach().clone() for e in ema]
    before = [e._version for e in ema]
    ema_multi_avg_fn(0.75, rounding=rounding)(ema, params)
    get_ema_multi_avg_fn(0.75)(expected, params, 1)
    assert all(torch.equal(e, x) and e.requires_grad for e, x in zip(ema, expected, strict=True))
    assert all(e._version > v for e, v in zip(ema, before, strict=True))


def test_a_model_that_is_gone(target: Target) -> None:
    model = nn.Linear(3, 3).to(target.device)
    ours, _ = side_by_side(model)
    for step in range(3):
        change(model, step)
        ours.update_parameters(model)
    gone = weakref.ref(model.weight)
    del model
    assert gone() is None, "its memory is given back"


@pytest.mark.parametrize("which", ["model", "average"])
@pytest.mark.parametrize("move", ["data", "dtype", "replaced", "transposed"])
def test_tensors_that_move_between_updates(target: Target, move: str, which: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(target.device)
    averages = side_by_side(model)
    for step in range(4):
        change(model, step)
        for average in averages:
            average.update_parameters(model)
    for module in [model] if which == "model" else [average.module for average in averages]:
        if move == "data":
            module[0].weight.data = module[0].weight.data.clone()
        elif move == "dtype":
            module[0].double()
            if which == "model":  # PyTorch's own takes one dtype alone
                for average in averages:
                    average.module[0].double()
        elif move == "replaced":
            module[0].weight = nn.Parameter(module[0].weight.detach() + 1)
        else:
            module[0].weight.data = module[0].weight.data.t()  # the same address, other elements
    if which == "average" and move == "dtype":
        model[0].double()
    for step in range(3):
        change(model, step)
        for average in averages:
            average.update_parameters(model)
        assert_same(*averages)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(target: Target, make: Any) -> None:
    model = nn.Linear(6, 6).to(target.device)
    average = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.5))
    for step in range(4):
        change(model, step)
        average.update_parameters(model)
    other = make(average)
    before = average.module.weight.clone()
    change(model, 7)
    other.update_parameters(model)
    assert torch.equal(average.module.weight, before)
    average.update_parameters(model)
    assert torch.equal(average.module.weight, other.module.weight)


def test_state_dict_round_trip(target: Target) -> None:
    model = nn.Linear(6, 6).to(target.device)
    ours, theirs = side_by_side(model)
    for step in range(4):
        change(model, step)
        theirs.update_parameters(model)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        change(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same(ours, theirs)


def test_stochastic_rounding(target: Target) -> None:
    model = nn.Linear(2000, 1, bias=False).to(target.device, torch.bfloat16)
    nn.init.ones_(model.weight)
    nearest = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.999))
    stochastic = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.999, rounding="stochastic"))
    for _ in range(100):
        nearest.update_parameters(model)
        stochastic.update_parameters(model)
        nn.init.zeros_(model.weight)
    assert (nearest.module.weight == 1).all()
    assert abs(stochastic.module.weight.double().mean().item() - 0.999**99) < 0.01


def test_misuse() -> None:
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"decay.*\[0, 1\].*{decay}"):
            ema_multi_avg_fn(decay)
    with pytest.raises(TypeError, match=r"decay has to be a number, and is '0\.9'"):
        ema_multi_avg_fn("0.9")
    with pytest.raises(ValueError, match=r"rounding.*'up'"):
        ema_multi_avg_fn(0.9, rounding="up")
    with pytest.raises(ValueError, match=r"2 tensors.* 1"):
        ema_multi_avg_fn(0.9)([torch.ones(1)] * 2, [torch.ones(1)], 1)
    ema_multi_avg_fn(0.9)([], [], 1)  # an empty list is none


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_average_on_the_cpu_of_a_model_on_the_gpu() -> None:
    model = Net().cuda()
    ours, theirs = side_by_side(model, device="cpu")
    for step in range(5):
        change(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same(ours, theirs)
