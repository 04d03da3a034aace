"""``ModelEma`` against timm's ``ModelEmaV3``, run side by side."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target
from ema_models import Net, assert_same, change, side_by_side
from timm.utils import ModelEmaV3
from torch import nn

from manpp_kernels import EmaPlan, ModelEma, ema_scale_update


def test_the_interface_is_timms() -> None:
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (ModelEma, ModelEmaV3))
    assert list(ours)[: len(theirs)] == list(theirs), "the same arguments in the same order"
    assert {n: p.default for n, p in theirs.items()} == {n: ours[n].default for n in theirs}
    public = {n for n in dir(ModelEmaV3) if not n.startswith("_")}
    assert public <= set(dir(ModelEma))
    for name in ("get_decay", "update", "set", "apply_update_", "apply_update_no_buffers_"):
        assert list(inspect.signature(getattr(ModelEma, name)).parameters) == list(
            inspect.signature(getattr(ModelEmaV3, name)).parameters
        )
    a, b = side_by_side(Net(), decay=0.9, device="cpu", use_warmup=True)
    for name, value in vars(b).items():
        if not name.startswith("_") and name != "foreach":
            assert getattr(a, name) == value
    assert not a.module.training


SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {"decay": 0.9},
    "default": {},
    "after a step": {"decay": 0.9, "update_after_step": 3},
    "warm-up": {"decay": 0.9, "use_warmup": True},
    "warm-up by other constants": {"decay": 0.99, "use_warmup": True, "warmup_gamma": 4.0, "warmup_power": 0.9},
    "warm-up with a minimum": {"decay": 0.99, "use_warmup": True, "min_decay": 0.6},
    "warm-up with a minimum above the end": {"decay": 0.9, "use_warmup": True, "min_decay": 0.95},
    "warm-up after a step": {"decay": 0.99, "use_warmup": True, "update_after_step": 4, "min_decay": 0.2},
    "buffers excluded": {"decay": 0.9, "exclude_buffers": True},
    "no foreach": {"decay": 0.9, "foreach": False},
    "on a device": {"decay": 0.9, "device": "cpu"},
    "another dtype": {"decay": 0.9, "dtype": torch.float64},
    "a dtype and no buffers": {"decay": 0.9, "dtype": torch.float64, "exclude_buffers": True},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(target: Target, schedule: str) -> None:
    options = dict(SCHEDULES[schedule])
    if "device" in options:
        options["device"] = target.device
    # module.to(dtype) makes a complex buffer a real one, which timm then cannot average.
    model = Net(torch.float if "dtype" in options else torch.cfloat).to(target.device)
    ours, theirs = side_by_side(model, **options)
    for step in range(12):
        change(model, step)
        if schedule != "plain":
            assert ours.get_decay(step) == theirs.get_decay(step)
        arguments = () if schedule == "plain" else (step,)
        ours.update(model, *arguments)
        theirs.update(model, *arguments)
        assert_same(ours, theirs, rtol=2e-6, atol=2e-6)


def test_get_decay_for_many_steps() -> None:
    for options in SCHEDULES.values():
        ours, theirs = side_by_side(nn.Linear(1, 1), **options)
        for step in [None, -5, 0, 1, 2, 3, 5, 10, 100, 1000, 10**6]:
            assert ours.get_decay(step) == theirs.get_decay(step)


def test_apply_and_set(target: Target) -> None:
    model = Net().to(target.device)
    ours, theirs = side_by_side(model)
    for step, name in enumerate(["apply_update_", "apply_update_no_buffers_", "apply_update_", "set", "apply_update_"]):
        change(model, step)
        for ema in (ours, theirs):
            arguments = () if name == "set" else (0.7,)
            with torch.no_grad():  # which of these methods timm's forgets
                getattr(ema, name)(model, *arguments)
        assert_same(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.set(model)
    for a, b in zip(ours.module.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_and_forward(target: Target) -> None:
    """Real steps of an optimizer, and the averaged model's predictions."""
    model = Net().to(target.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ours, theirs = side_by_side(model, decay=0.8)
    x = torch.randn(8, 3, 6, 6, device=target.device)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        ours.update(model)
        theirs.update(model)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours(x), model.eval()(x))
    assert all(p.grad is None for p in ours.module.parameters())


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ema_dtype", [None, torch.float32], ids=str)
def test_dtypes(target: Target, model_dtype: torch.dtype, ema_dtype: torch.dtype | None) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).to(target.device, model_dtype)
    ours, theirs = side_by_side(model, decay=0.75, dtype=ema_dtype, stochastic_rounding=False)
    for step in range(4):
        change(model, step)
        ours.update(model)
        theirs.update(model)
    dtype = ema_dtype or model_dtype
    tolerance = 4 * torch.finfo(dtype).eps
    assert_same(ours, theirs, rtol=tolerance, atol=tolerance)


def test_stochastic_rounding_of_bfloat16(target: Target) -> None:
    """By default, as in timm: it moves where nearest stalls, on private random numbers."""
    n, steps, decay = 4000, 200, 0.999

    def model() -> nn.Module:
        module = nn.Linear(n, 1, bias=False).to(target.device, torch.bfloat16)
        nn.init.ones_(module.weight)
        return module

    source = model()
    emas = {
        "ours": ModelEma(source, decay),
        "timm": ModelEmaV3(source, decay),
        "again": ModelEma(source, decay),
        "other seed": ModelEma(source, decay, stochastic_rounding_seed=1),
        "nearest": ModelEma(source, decay, stochastic_rounding=False),
        "rounding=nearest": ModelEma(source, decay, rounding="nearest"),
    }
    nn.init.zeros_(source.weight)
    state = torch.get_rng_state()
    for _ in range(steps):
        for ema in emas.values():
            ema.update(source)
    assert torch.equal(torch.get_rng_state(), state), "the global random numbers are left alone"
    weights = {name: ema.module.weight for name, ema in emas.items()}
    # Azuma-Hoeffding, as in the tests of the operator: above this with a probability below 1e-9.
    allowed = torch.finfo(torch.bfloat16).eps / 2 * math.sqrt(2 * steps * math.log(2 / 1e-9) / n)
    for name in ("ours", "timm", "other seed"):
        assert abs(weights[name].double().mean().item() - decay**steps) <= allowed, name
    assert torch.equal(weights["ours"], weights["again"]), "every rank rounds alike"
    assert not torch.equal(weights["ours"], weights["other seed"])
    assert (weights["nearest"] == 1).all()
    assert (weights["rounding=nearest"] == 1).all()


def test_rounding_of_float16(target: Target) -> None:
    """timm has none; ``rounding="stochastic"`` asks for it."""
    source = nn.Linear(1000, 1, bias=False).to(target.device, torch.float16)
    nn.init.ones_(source.weight)
    default, stochastic = ModelEma(source, 0.9999), ModelEma(source, 0.9999, rounding="stochastic")
    nn.init.zeros_(source.weight)
    for _ in range(20):
        default.update(source)
        stochastic.update(source)
    assert (default.module.weight == 1).all()
    assert (stochastic.module.weight < 1).any()


def test_a_wrapped_model_has_other_names(target: Target) -> None:
    model = Net().to(target.device)
    wrapped = nn.Sequential(model)  # as DistributedDataParallel puts "module." before every name
    ours, theirs = side_by_side(model, decay=0.5)
    change(model, 0)
    ours.update(wrapped)
    theirs.update(wrapped)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tied_weights_are_averaged_once(target: Target) -> None:
    """timm averages a tied weight once for each of its names, except where buffers are excluded."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.outer.weight = self.inner.weight

    model = Tied().to(target.device)
    ours, _ = side_by_side(model, decay=0.5)
    _, once = side_by_side(model, decay=0.5, exclude_buffers=True)
    change(model, 0)
    ours.update(model)
    once.update(model)
    assert_same(ours, once, rtol=1e-6, atol=1e-6)
    assert ours.module.inner.weight is ours.module.outer.weight


def test_state_dict_hooks(target: Target) -> None:
    """A module may hand out tensors that are made for its state_dict: they are looked up at every step."""

    class Scaled(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "weight"] = self.weight * 2 if self.training else self.weight

    model = Scaled(3, 3).to(target.device).train()
    ours, theirs = side_by_side(model, decay=0.5)
    for step in range(3):
        change(model, step)
        ours.update(model)
        theirs.update(model)
        assert_same(ours, theirs, rtol=1e-6, atol=1e-6)


def test_misuse() -> None:
    model = nn.Linear(3, 4)
    ema = ModelEma(model)
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="the model has 1 parameters and buffers, its EMA 2"):
        ema.update(nn.Linear(3, 4, bias=False))
    with pytest.raises(ValueError, match=r"weight has the shape \(4, 5\) in the model, \(4, 3\) in its EMA"):
        ema.update(nn.Linear(5, 4))
    moved = ModelEma(model)
    moved.decay = 1.5  # as a schedule of one's own may
    with pytest.raises(ValueError, match=r"momentum.*\[0, 1\].*1\.5"):
        moved.update(model)
    with pytest.raises(ValueError, match=r"rounding.*'up'"):
        ModelEma(model, rounding="up")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ema.state_dict().values(), strict=True))


def test_modules_without_parameters() -> None:
    ema = ModelEma(nn.ReLU())
    ema.update(nn.ReLU())
    ema.set(nn.ReLU())
    assert ema(torch.tensor(-1.0)).item() == 0.0


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_tensors_that_share_memory(target: Target, exclude_buffers: bool) -> None:
    """Two buffers that are views of one storage, which deepcopy keeps, are averaged one after the other."""
    model = Net().to(target.device)
    base = torch.randn(11, device=target.device)
    model.register_buffer("first", base[1:])
    model.register_buffer("second", base[:-1])
    ours, theirs = side_by_side(model, decay=0.5, exclude_buffers=exclude_buffers)
    theirs.foreach = False  # on a GPU one launch for both is a race
    for step in range(3):
        change(model, step)
        ours.update(model)
        theirs.update(model)
        assert_same(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_complex_parameters(target: Target, exclude_buffers: bool) -> None:
    model = nn.Linear(3, 2, dtype=torch.cfloat).to(target.device)
    ours, theirs = side_by_side(model, decay=0.5, exclude_buffers=exclude_buffers)
    for step in range(3):
        change(model, step)
        ours.update(model)
        theirs.update(model)
    if exclude_buffers:  # else they are copied, as timm does
        assert not torch.equal(ours.module.weight, model.weight)
    assert_same(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["decay", "min_decay"])
def test_a_decay_that_cannot_be_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has to lie in \[0, 1\], and is 2\.0"):
        ModelEma(nn.Linear(2, 2), **{name: 2.0})
    with pytest.raises(TypeError, match=f"{name} has to be a number, and is '0.9'"):
        ModelEma(nn.Linear(2, 2), **{name: "0.9"})


def test_numbers_of_numpy() -> None:
    """A schedule that is computed with NumPy gives such."""
    half = np.float32(0.5)
    ema, params = [torch.zeros(3)], [torch.ones(3)]
    ema_scale_update(ema, params, half)
    EmaPlan(ema, params).update(half)
    assert ema[0].tolist() == [0.75] * 3
    model, moved = nn.Linear(3, 3), nn.Linear(3, 3)
    averages = [ModelEma(model, decay=decay, min_decay=decay) for decay in (0.5, half)]
    for average in averages:
        average.update(moved)
    assert_same(*averages)
