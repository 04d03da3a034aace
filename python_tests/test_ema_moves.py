"""``ModelEma`` copied, saved, restored, moved, and given other tensors between its updates; beside timm's."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Target
from ema_models import Net, assert_same, change, side_by_side
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manpp_kernels import ModelEma, ema_multi_avg_fn


def roundtrip(ema: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(ema, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), roundtrip], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies(target: Target, dtype: torch.dtype, make: Callable[[nn.Module], nn.Module]) -> None:
    """A copy goes on by itself, from the same state (that of the random numbers, too), and leaves the first alone."""
    model = Net(torch.float).to(target.device, dtype)
    ema = ModelEma(model, decay=0.5)
    ema.update(model)
    change(model, 0)
    ema.update(model)
    other = make(ema)
    before = copy.deepcopy(ema.state_dict())
    change(model, 1)
    other.update(model)
    for name, value in ema.state_dict().items():
        assert torch.equal(value, before[name]), name
    ema.update(model)
    for (name, a), b in zip(ema.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_pickle_whose_device_is_not_there() -> None:
    """As where an EMA that was on a GPU is opened without one: its random numbers wait for that device."""
    ema = ModelEma(nn.Linear(3, 3), decay=0.5)
    elsewhere, state = torch.device("cuda", 7), torch.arange(16, dtype=torch.uint8)
    ema._generator_states[elsewhere] = state
    for other in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema)), roundtrip(ema)):
        other.update(nn.Linear(3, 3))
        assert torch.equal(other._generator_states[elsewhere], state)


def test_state_dict_round_trip(target: Target) -> None:
    """Also from timm's, and into it: the keys are the same."""
    model = Net().to(target.device)
    ours, theirs = side_by_side(model, decay=0.5)
    for step in range(3):
        change(model, step)
        ours.update(model)
        theirs.update(model)
    for assign in (False, True):
        restored = ModelEma(Net().to(target.device), decay=0.5)
        restored.update(model)  # its launches are prepared, for the tensors it has now
        restored.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=assign)
        change(model, 9)
        expected = copy.deepcopy(theirs)
        for ema in (restored, expected):
            ema.update(model)
        a, b = restored.state_dict(), expected.state_dict()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())


def _replace_parameter(model: nn.Module, ema: nn.Module) -> None:
    model.head.bias = nn.Parameter(torch.randn_like(model.head.bias))


def _replace_buffer(model: nn.Module, ema: nn.Module) -> None:
    model.mask = ~model.mask


def _replace_buffer_of_ema(model: nn.Module, ema: nn.Module) -> None:
    norm = ema.module.features[1]
    norm.running_mean = norm.running_mean.clone()


def _replace_module(model: nn.Module, ema: nn.Module) -> None:
    model.head = nn.Linear(5, 4).to(model.frozen.device)


def _replace_module_of_ema(model: nn.Module, ema: nn.Module) -> None:
    ema.module.head = copy.deepcopy(ema.module.head)


def _new_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data.clone()


def _to_empty(model: nn.Module, ema: nn.Module) -> None:
    values = [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]
    model.to_empty(device=model.frozen.device)
    with torch.no_grad():
        for t, value in zip([*model.parameters(), *model.buffers()], values, strict=True):
            t.copy_(value)


MOVES: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "model.data": lambda model, ema: _new_data(model),
    "ema.data": lambda model, ema: _new_data(ema),
    "model.to(dtype)": lambda model, ema: model.double(),
    "ema.to(dtype)": lambda model, ema: ema.double(),
    "model.to(memory_format)": lambda model, ema: model.to(memory_format=torch.channels_last),
    "a parameter is replaced": _replace_parameter,
    "a buffer is replaced": _replace_buffer,
    "a buffer of the EMA is replaced": _replace_buffer_of_ema,
    "a module is replaced": _replace_module,
    "a module of the EMA is replaced": _replace_module_of_ema,
    "load_state_dict(assign)": lambda model, ema: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "to_empty": _to_empty,
}


@pytest.mark.parametrize("exclude_buffers", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_tensors_that_move_between_updates(target: Target, move: str, exclude_buffers: bool) -> None:
    torch.manual_seed(0)
    model = Net().to(target.device)
    ours, theirs = side_by_side(model, decay=0.5, exclude_buffers=exclude_buffers)
    for ema in (ours, theirs):
        ema.update(model)
    torch.manual_seed(1)
    MOVES[move](model, ours)
    if move == "ema.to(dtype)":
        theirs.double()
    for step in range(2):
        change(model, step)
        for ema in (ours, theirs):
            ema.update(model)
        assert_same(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("exclude_buffers", [False, True])
@pytest.mark.parametrize("move", ["model", "ema"])
def test_a_model_without_buffers_that_changes_its_dtype(target: Target, move: str, exclude_buffers: bool) -> None:
    """Its parameters are the same objects afterwards, and how they are rounded is another question."""
    model = nn.Linear(4000, 1, bias=False).to(target.device)
    nn.init.ones_(model.weight)
    ema = ModelEma(model, decay=0.999, exclude_buffers=exclude_buffers)
    ema.update(model)
    for module in (model, ema) if move == "ema" else (ema.module,):
        module.bfloat16()
    nn.init.zeros_(model.weight)
    for _ in range(100):
        ema.update(model)
    assert ema.module.weight.dtype == torch.bfloat16
    assert abs(ema.module.weight.float().mean() - 0.999**100) < 0.01, "rounded to nearest it stays at 1"


def test_a_sparse_buffer_has_no_address(target: Target) -> None:
    model = nn.Linear(3, 2).to(target.device)
    model.register_buffer("graph", torch.eye(3, device=target.device).to_sparse(), persistent=False)
    ema = ModelEma(model, decay=0.5)
    for step in range(3):
        before = ema.module.weight.clone()
        with torch.no_grad():
            model.weight.add_(step)
        ema.update(model)
        torch.testing.assert_close(ema.module.weight, 0.5 * before + 0.5 * model.weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("move", ["model", "ema", "both"])
def test_a_model_without_buffers_that_changes_its_device(move: str) -> None:
    model = nn.Linear(5, 3)
    ours, theirs = side_by_side(model, decay=0.5)
    for step in range(4):
        change(model, step)
        ours.update(model)
        if step == 1 and move != "ema":
            model.cuda()
        if step == 1 and move != "model":
            ours.cuda()
        for e, p in zip(theirs.module.parameters(), model.parameters(), strict=True):
            e.data.lerp_(p.data.cpu(), 0.5)
    for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_another_model_and_a_model_that_is_gone(target: Target) -> None:
    first, second = Net().to(target.device), Net().to(target.device)
    ours, theirs = side_by_side(first, decay=0.5)
    for model in (first, second, first, second):
        for ema in (ours, theirs):
            ema.update(model)
        assert_same(ours, theirs, rtol=2e-6, atol=2e-6)
    gone = weakref.ref(second.frozen)
    del second, model
    assert gone() is None, "the EMA keeps no memory of the model's"
    ours.update(first)
    theirs.update(first)
    assert_same(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors(mesh: DeviceMesh) -> None:
    """What FSDP2 makes of parameters: each rank averages its shards."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    for module in model:
        for name, p in module.named_parameters():
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    ours, theirs = side_by_side(model, decay=0.5, foreach=False)  # foreach takes no mix of shards and plain buffers
    torchs = [AveragedModel(model, multi_avg_fn=f(0.5)) for f in (ema_multi_avg_fn, get_ema_multi_avg_fn)]
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step)
        for ema in (ours, theirs):
            ema.update(model)
        for average in torchs:
            average.update_parameters(model)
        for a, b in [(ours, theirs), torchs]:
            for x, y in zip(a.module.parameters(), b.module.parameters(), strict=True):
                assert isinstance(x, DTensor)
                torch.testing.assert_close(x.full_tensor(), y.full_tensor())


def test_a_model_that_fsdp2_shards_later(mesh: DeviceMesh) -> None:
    """FSDP2 refuses to be copied, so its EMA starts before it does."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    ours, plain = ModelEma(model, decay=0.5), ModelEma(model, decay=0.5)
    twin = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    x = torch.randn(8, 4)
    for network, ema in ((model, ours), (twin, plain)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
            ema.update(network)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices(device: str) -> None:
    """An EMA on the CPU of a model on the GPU, and either of them moved later."""
    model = Net().cuda()
    ours, theirs = side_by_side(model, decay=0.5, device=device)
    for step in range(3):
        change(model, step)
        ours.update(model)
        theirs.update(model)
        assert_same(ours, theirs, rtol=2e-6, atol=2e-6)
    assert next(ours.parameters()).device.type == device
    ours.to("cpu" if device == "cuda" else "cuda")
    change(model, 5)
    ours.update(model)
    theirs.update(model)
    assert_same(ours.to(device), theirs, rtol=2e-6, atol=2e-6)
    model.cpu()
    change(model, 6)
    ours.to("cpu").update(model)
    theirs = theirs.to("cpu")
    theirs.device = "cpu"
    theirs.update(model)
    assert_same(ours, theirs, rtol=2e-6, atol=2e-6)
