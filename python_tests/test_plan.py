"""``EmaPlan``: the same as the operator, step after step, and never a write through an address that has gone stale."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from conftest import Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, LAYOUTS, SIZES, Sample, assert_effective_weights, assert_ema_step, clones
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import manpp_kernels
from manpp_kernels import EmaPlan, backends, ema_scale_update
from manpp_kernels.cli import doctor

SHAPES = [(3,), (2, 5), (2, 3, 4, 5), (0, 2), ()]


def tensors(dtype: torch.dtype, device: str, seed: int, layout: str = "contiguous", shapes=SHAPES) -> list[Tensor]:
    return [Sample(s, dtype, layout, seed=seed + i, device=device).view for i, s in enumerate(shapes)]


@pytest.mark.parametrize(("ema_dtype", "params_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_equals_the_operator(target: Target, ema_dtype: torch.dtype, params_dtype: torch.dtype) -> None:
    shapes = [(n,) for n in SIZES]
    ema, params = (
        tensors(ema_dtype, target.device, 0, shapes=shapes),
        tensors(params_dtype, target.device, 50, shapes=shapes),
    )
    expected = clones(ema)
    plan = EmaPlan(ema, params)
    for step, momentum in enumerate([0.0, 0.9, 0.5, 1.0, 0.999]):
        before = clones(ema)
        for p in params:
            p.mul_(0.5).add_(step)
        assert plan.update(momentum) is None
        assert_ema_step(ema, before, params, momentum)
        ema_scale_update(expected, params, momentum)
        assert all(torch.equal(a, b) for a, b in zip(ema, expected, strict=True)), "not a bit apart from the operator"


@pytest.mark.parametrize(("ema_layout", "params_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_pair_of_layouts(target: Target, ema_layout: str, params_layout: str) -> None:
    ema = [Sample(s, torch.float32, ema_layout, seed=i, device=target.device) for i, s in enumerate(SHAPES)]
    params = [Sample(s, torch.bfloat16, params_layout, seed=9 + i, device=target.device) for i, s in enumerate(SHAPES)]
    views, read = [s.view for s in ema], [s.view for s in params]
    plan = EmaPlan(views, read)
    for momentum in (0.3, 0.6):
        before = clones(views)
        plan.update(momentum)
        assert_ema_step(views, before, read, momentum)
    assert all(s.surroundings_untouched() for s in ema + params)


@pytest.mark.parametrize("bias_layout", LAYOUTS)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_effective_weights_with_groups(target: Target, bias_dtype: torch.dtype, bias_layout: str) -> None:
    ema, params = tensors(torch.float32, target.device, 0), tensors(torch.float32, target.device, 20)
    bias = tensors(bias_dtype, target.device, 40, bias_layout)
    groups = [0, 2, 2, 1, 0]
    plan = EmaPlan(ema, params, bias=bias, groups=groups, total=1.5)
    for values in ([0.5, 1.0, 0.75], [0.25, -1.0, 2.0]):
        before = clones(ema)
        weights = plan.update(0.9, torch.tensor(values, device=target.device))
        assert_ema_step(ema, before, params, 0.9)
        assert_effective_weights(weights, ema, bias, [values[g] for g in groups], 1.5)


def test_effective_weights_stand_at_fixed_addresses_and_carry_gradients(target: Target) -> None:
    ema, params = tensors(torch.float32, target.device, 0), tensors(torch.float32, target.device, 20)
    bias = [b.requires_grad_() for b in tensors(torch.float32, target.device, 40)]
    scale = torch.tensor(0.75, device=target.device, requires_grad=True)
    plan = EmaPlan(ema, params, bias=bias)
    addresses = []
    for _ in range(2):
        weights = plan.update(0.9, scale)
        addresses.append([w.data_ptr() for w in weights])
        got = torch.autograd.grad(sum((w**2).sum() for w in weights), [scale, *bias])
        expected_bias = [0.75 * 2 * w.detach() for w in weights]
        expected_scale = sum((2 * w * (b - e)).sum() for w, b, e in zip(weights, bias, ema, strict=True)).detach()
        torch.testing.assert_close(list(got), [expected_scale, *expected_bias], rtol=1e-5, atol=1e-5)
    assert addresses[0] == addresses[1]
    with torch.no_grad():
        assert not plan.update(0.9, scale)[0].requires_grad


@pytest.mark.parametrize("trained", ["scale", "bias", "neither"])
def test_a_graph_over_overwritten_weights_cannot_run_backward(target: Target, trained: str) -> None:
    ema, params, bias = torch.randn(3, 6, device=target.device).unbind()
    scale, x = torch.ones((), device=target.device), torch.ones(6, device=target.device, requires_grad=True)
    scale.requires_grad_(trained == "scale")
    bias = bias.clone().requires_grad_(trained == "bias")
    plan = EmaPlan(ema, params, bias=bias)
    for grad in (True, False):
        (w,) = plan.update(0.9, scale)
        loss = (w * x).sum()
        with torch.set_grad_enabled(grad):
            plan.update(0.9, scale)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            loss.backward()


def test_autograd_sees_the_write(target: Target) -> None:
    ema, params = torch.randn(2, 6, device=target.device).unbind()
    weight = torch.randn(6, device=target.device, requires_grad=True)
    plan = EmaPlan(ema, params)
    for momentum in (0.9, 0.9, torch.tensor(0.9, device=target.device)):  # the second goes the plan's short way
        loss = (weight * ema).sum()
        plan.update(momentum)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("momentum_dtype", DTYPES, ids=str)
def test_momentum_as_a_tensor(target: Target, momentum_dtype: torch.dtype) -> None:
    ema, params = tensors(torch.float32, target.device, 0), tensors(torch.float32, target.device, 20)
    plan = EmaPlan(ema, params)
    momentum = torch.tensor(0.5, dtype=momentum_dtype, device=target.device)
    for value in (0.5, 0.9, 0.1):
        momentum.fill_(value)  # as a schedule in a CUDA graph does
        before = clones(ema)
        plan.update(momentum)
        assert_ema_step(ema, before, params, momentum.item())


def test_stochastic_rounding(target: Target) -> None:
    n = 20_000
    ema = torch.zeros(n, dtype=torch.bfloat16, device=target.device)
    params = torch.full((n,), 1 + 2**-9, device=target.device)
    plan = EmaPlan(ema, params, rounding="stochastic")

    def steps(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [(plan.update(0.0), ema.clone())[1] for _ in range(3)]

    first, again, other = steps(1), steps(1), steps(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "reproducible under manual_seed"
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert abs((first[0] > 1).double().mean().item() - 0.25) < 0.02
    torch.manual_seed(1)
    ema_scale_update(ema, params, 0.0, rounding="stochastic")
    assert torch.equal(ema, first[0]), "the bits of the operator"


@pytest.mark.parametrize("made", [False, True], ids=["used", "made"])
def test_first_used_in_inference_mode(target: Target, made: bool) -> None:
    ema = torch.zeros(6, dtype=torch.bfloat16, device=target.device)
    params, bias = (torch.ones(6, device=target.device, requires_grad=True) for _ in range(2))
    scale = torch.ones((), device=target.device)
    with torch.inference_mode(made):
        plan = EmaPlan(ema, params, bias=bias, rounding="stochastic")
    with torch.inference_mode():
        plan.update(0.5, scale)
    found = plan.update(0.5, scale)
    assert found is not None
    found[0].sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [1.0] * 6


def test_forward_mode_is_refused(target: Target) -> None:
    ema, params = torch.ones(6, device=target.device), torch.zeros(6, device=target.device)
    plan = EmaPlan(ema, params, bias=params.clone())
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.ones((), device=target.device), torch.ones((), device=target.device))
        with pytest.raises(RuntimeError, match="forward mode"):
            plan.update(0.5, scale)
        with pytest.raises(RuntimeError, match="forward mode"):
            ema_scale_update([ema], [params], 0.5, scale=scale, bias=[params.clone()])
        assert plan.update(0.5, torch.ones((), device=target.device)) is not None  # nothing that has a tangent
    assert ema.tolist() == [0.5] * 6


def test_the_plan_keeps_its_tensors_alive(target: Target) -> None:
    ema = torch.ones(1000, device=target.device)
    plan = EmaPlan([ema], [torch.zeros(1000, device=target.device)])
    _ = [torch.full((1000,), 9.0, device=target.device) for _ in range(20)]  # would take over freed memory
    plan.update(0.5)
    assert (ema == 0.5).all()


def test_lists_changed_later_do_not_change_the_plan(target: Target) -> None:
    ema, params = [torch.ones(3, device=target.device)], [torch.zeros(3, device=target.device)]
    plan = EmaPlan(ema, params)
    ema.append(torch.ones(3, device=target.device))
    params.clear()
    plan.update(0.5)
    assert [e.tolist() for e in ema] == [[0.5] * 3, [1.0] * 3]


def test_empty_lists_and_single_tensors(target: Target) -> None:
    assert EmaPlan([], []).update(0.9) is None
    assert EmaPlan([], [], bias=[]).update(0.9, torch.ones((), device=target.device)) == []
    ema = torch.ones(3, device=target.device)
    plan = EmaPlan(ema, torch.zeros(3, device=target.device))
    plan.update(0.5)
    plan.update(0)
    assert ema.tolist() == [0.0] * 3


def test_thousands_of_tensors(target: Target) -> None:
    sizes = [i % 19 for i in range(2000)]
    ema, params = (list(torch.randn(sum(sizes), device=target.device).split(sizes)) for _ in range(2))
    plan = EmaPlan(ema, params)
    for _ in range(2):
        before = clones(ema)
        plan.update(0.9)
        assert_ema_step(ema, before, params, 0.9)


def test_momentum_is_checked_at_every_update(target: Target) -> None:
    ema = torch.ones(3, device=target.device)
    plan = EmaPlan(ema, torch.zeros(3, device=target.device))
    plan.update(1.0)
    for momentum, kind in [
        (-0.1, ValueError),
        (1.1, ValueError),
        (float("nan"), ValueError),
        ("0.5", TypeError),
        (None, TypeError),
    ]:
        with pytest.raises(kind, match="momentum"):
            plan.update(momentum)
    assert ema.tolist() == [1.0] * 3


def test_ema_that_requires_grad(target: Target) -> None:
    for i in range(2):
        ema = [torch.ones(3, device=target.device, requires_grad=i == k) for k in range(2)]
        plan = EmaPlan(ema, [torch.zeros(3, device=target.device)] * 2)
        with torch.no_grad():
            plan.update(0.5)
        with pytest.raises(RuntimeError, match=rf"ema\[{i}\] requires grad"):
            plan.update(0.5)
        assert all(e.tolist() == [0.5] * 3 for e in ema)


def test_ema_that_comes_to_require_grad(target: Target) -> None:
    ema, params, bias = torch.ones(3, 3, device=target.device).unbind()
    plan = EmaPlan(ema, params, bias=bias)
    scale = torch.ones((), device=target.device)
    plan.update(0.5, scale)
    plan.ema[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"ema\[0\] requires grad"):
        plan.update(0.5, scale)


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_backend_may_change_between_updates(target: Target) -> None:
    ema, params = torch.ones(2, 50, device=target.device).unbind()
    params = params * 0
    plan = EmaPlan(ema, params)
    plan.update(0.5)
    for backend in ("eager", target.backend):
        with manpp_kernels.use_backend(backend), Calls() as calls:
            plan.update(0.5)
        assert ("manpp_kernels.ema_scale_update.eager" in calls.names) == (backend == "eager")
    assert ema.tolist() == [0.125] * 50


def test_compiled_for_another_python(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' library serves every Python, that of the plans one version: plans then run the operators."""
    monkeypatch.setattr(backends, "PLANS_COMPILED", False)
    ema, params = torch.randn(2, 8, device=target.device).unbind()
    before = clones([ema])
    plan = EmaPlan(ema, params)
    plan.update(0.75)
    assert_ema_step([ema], before, [params], 0.75)
    assert "not for Python" in doctor._compiled()


def test_copies_and_pickles_are_refused(target: Target) -> None:
    """Both would have to guess which tensors the new plan means."""
    plan = EmaPlan(torch.ones(3, device=target.device), torch.zeros(3, device=target.device))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="EmaPlan"):
            attempt(plan)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
            *[st.sampled_from(DTYPES)] * 3,
            *[st.sampled_from(LAYOUTS)] * 3,
        ),
        max_size=5,
    ),
    actions=st.lists(
        st.tuples(st.sampled_from(["none", "ema", "params", "bias"]), st.floats(0, 1)), min_size=1, max_size=5
    ),
)
def test_any_history(target: Target, entries, actions) -> None:
    """Updates with tensors moving in between, against the operator on tensors that nobody moves."""
    lists = [
        [Sample(e[0], e[1 + k], e[4 + k], seed=5 * i + k, device=target.device).view for i, e in enumerate(entries)]
        for k in range(3)
    ]
    still = [clones(values) for values in lists]
    plan = EmaPlan(lists[0], lists[1], bias=lists[2])
    scale = torch.tensor(0.5, device=target.device)
    for which, momentum in actions:
        if which != "none":
            for t in lists[["ema", "params", "bias"].index(which)]:
                t.data = t.data.clone()
        weights = plan.update(momentum, scale)
        expected = ema_scale_update(still[0], still[1], momentum, scale=scale, bias=still[2])
        for a, b in zip(lists[0] + weights, still[0] + expected, strict=True):
            assert torch.equal(a, b)
