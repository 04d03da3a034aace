"""``TrainerConfig.compile``: the blocks' bodies and auxiliary networks, compiled each on its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from manpp_kernels.local import SavedTensorMeter, rule_names
from manpp_kernels.local.recompute import Recomputed
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

PARAMETER: dict[str, Any] = {"rule_options": {"form": "parameter"}}
UNLOCKED: dict[str, Any] = {"order": "unlocked", **PARAMETER}
RULES: list[tuple[str, dict[str, Any]]] = [*((rule, {}) for rule in rule_names()), ("man++", PARAMETER)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 8, 8), torch.arange(n) % 4


def small_trainer(**settings: Any) -> LocalTrainer:
    torch.manual_seed(0)
    model = CifarResNet((1, 2, 1), num_classes=4, widths=(4, 6, 8))
    return LocalTrainer(model, TrainerConfig(**settings), example=(3, 8, 8))


class Sized(nn.Sequential):
    """Layers whose number of features tells them apart."""

    def __init__(self, features: int) -> None:
        super().__init__(nn.Linear(features, features + 1), nn.BatchNorm1d(features + 1), nn.ReLU())


def linear_trainer(layers: int, **settings: Any) -> LocalTrainer:
    """Of layers whose number of features tells them apart, and which compile fast."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8 + i, 9 + i) for i in range(layers)), nn.Linear(8 + layers, 4))
    return LocalTrainer(model, TrainerConfig(rule="dgl", rule_options={"width": "linear"}, **settings), example=(8,))


class Recorder:
    """A backend of torch.compile that notes the sizes that each graph was made for, and runs it as it is."""

    def __init__(self) -> None:
        self.sizes: list[list[torch.Size]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.sizes.append([t.shape for t in inputs if isinstance(t, torch.Tensor)])
        return graph.forward


@pytest.mark.parametrize(("rule", "settings"), [*RULES, ("man++", UNLOCKED)], ids=str)
def test_the_same_values_in_whole_graphs(rule: str, settings: dict[str, Any]) -> None:
    settings = {"rule": rule, "blocks": 1 if rule == "e2e" else 3, **settings}
    plain, compiled = small_trainer(**settings), small_trainer(compile="aot_eager", **settings)
    for n in (8, 8):
        data = images(n)
        results = []
        for trainer in (plain, compiled):
            torch.manual_seed(n)
            results.append(trainer.step(data).losses)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert list(compiled.export_state_dict()) == list(plain.export_state_dict())
    for key, value in compiled.network.state_dict().items():
        torch.testing.assert_close(value, plain.network.state_dict()[key], rtol=1e-3, atol=1e-4, msg=key)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 2 * len(compiled.network) - 1


def test_an_epoch_measures_what_compiled_blocks_keep() -> None:
    """The hooks of the meter see what compiled code keeps, and nothing is compiled for them or computed otherwise."""
    peaks, states, graphs = [], [], []
    for settings in ({"compile": "eager", "measure_memory": False}, {"compile": "eager"}, {}):
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = nn.Sequential(Sized(8), nn.Dropout(0.5), Sized(9), nn.Linear(10, 4))
        trainer = LocalTrainer(model, TrainerConfig(rule="dgl", blocks=2, **settings), example=(8,))
        batches = [(torch.rand(n, 8), torch.arange(n) % 4) for n in (8, 8, 6)]
        peaks.append([row["peak_memory_bytes"] for row in trainer.fit(batches, 2)])
        states.append(list(trainer.network.state_dict().values()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert peaks[0] == [None, None]
    assert peaks[1] == peaks[2]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert graphs[1] == graphs[0] > 0


RECOMPUTED: list[dict[str, Any]] = [
    {"rule": "e2e"},
    {"rule": "dgl", "blocks": 2, "accumulate": 2},
    {"rule": "man++", "blocks": 2, **UNLOCKED},
]


@pytest.mark.parametrize("settings", RECOMPUTED, ids=str)
def test_recomputed_units_keep_less_and_give_the_same(settings: dict[str, Any]) -> None:
    peaks, results = [], []
    for recompute, backend in ((False, None), (False, "aot_eager"), (True, "aot_eager")):
        trainer = small_trainer(compile=backend, recompute=recompute, **copy.deepcopy(settings))
        data = images(8)
        trainer.step(data)
        with SavedTensorMeter(trainer.persistent_tensors()) as meter:
            losses = trainer.step(data).losses
        peaks.append(meter.peak_bytes)
        results.append((losses, list(trainer.network.state_dict().values())))  # the wrapper is in the names
    assert peaks[2] < peaks[1]
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-3, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_recomputed_units_draw_the_same_random_numbers(backend: str) -> None:
    x = torch.ones(200, requires_grad=True)
    y = torch.compile(Recomputed(nn.Dropout(0.5)), backend=backend, fullgraph=True)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)  # 2 or 0
    assert 0 < y.count_nonzero() < y.numel()


class Breaking(nn.Sequential):
    """What no compiler takes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_recomputed_unit_that_cannot_be_compiled_whole_is_an_error() -> None:
    """Run as it is, it would count every batch twice."""
    model = nn.Sequential(nn.Linear(8, 8), Breaking(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 4))
    batch = torch.rand(8, 8), torch.arange(8) % 4
    for recompute in (False, True):
        trainer = LocalTrainer(model, TrainerConfig(rule="e2e", recompute=recompute, compile="aot_eager"), example=(8,))
        if recompute:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                trainer.step(batch)
        else:
            trainer.step(batch)


def test_a_power_iteration_is_not_compiled_and_recomputed() -> None:
    layers = [parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(3)]
    config = TrainerConfig(rule="e2e", recompute=True, compile="aot_eager")
    with pytest.raises(ValueError, match="without spectral normalisation, and the model has some"):
        LocalTrainer(nn.Sequential(*layers, nn.Linear(8, 4)), config, example=(8,))


def test_every_block_is_compiled_and_for_its_own_sizes() -> None:
    """More blocks than PyTorch compiles versions of one function, which is 8; and none for the sizes of another."""
    recorder = Recorder()
    torch._dynamo.register_backend(recorder, name="manpp_recorder")
    trainer = linear_trainer(10, compile="manpp_recorder")
    blocks = len(trainer.network)
    trainer.step((torch.rand(8, 8), torch.arange(8) % 4))
    assert len(recorder.sizes) == 2 * blocks - 1
    assert all(isinstance(n, int) for sizes in recorder.sizes for size in sizes for n in size)
    trainer.step((torch.rand(8, 8), torch.arange(8) % 4))
    assert len(recorder.sizes) == 2 * blocks - 1
    for n in (6, 4):  # a second size is compiled for any, and a third finds that
        trainer.step((torch.rand(n, 8), torch.arange(n) % 4))
        assert len(recorder.sizes) == 2 * (2 * blocks - 1)


def test_networks_know_nothing_of_each_others_sizes() -> None:
    recorder = Recorder()
    torch._dynamo.register_backend(recorder, name="manpp_sizes")
    for n, blocks in ((8, 3), (6, 4), (4, 3)):
        trainer = linear_trainer(4, blocks=blocks, compile="manpp_sizes")
        trainer.step((torch.rand(n, 8), torch.arange(n) % 4))
        assert len(recorder.sizes) == 2 * blocks - 1
        assert all(isinstance(n, int) for sizes in recorder.sizes for size in sizes for n in size)
        recorder.sizes.clear()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_works_on_its_own(copied: Any) -> None:
    network = small_trainer(rule="dgl", blocks=2, compile="eager").network
    other = copied(network)
    batch = images(8)
    x = batch[0]
    for block, twin in zip(network, other, strict=True):
        features, loss, _ = twin(x, *batch)
        loss.backward()
        assert all(p.grad is None for p in block.parameters())
        assert all(p.grad is not None for p in twin.parameters())
        assert torch.equal(block(x, *batch).loss, loss)
        x = features


def test_hooks_of_the_users_stay() -> None:
    seen = []
    trainer = small_trainer(rule="dgl", blocks=2, compile="eager")
    for block in trainer.network:
        block.body.register_forward_hook(lambda *_: seen.append(1))
    trainer.step(images(8))
    trainer.step(images(8))
    assert len(seen) == 2 * len(trainer.network)
    assert not torch._dynamo.utils.counters["graph_break"]
