"""The saved-tensor meter against cases counted by hand, and the memory that the rules are held to."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from manpp_kernels.local import SavedTensorMeter, measure_step_memory
from manpp_kernels.local.heads import AveragePool, GlobalAveragePool, HeadPool
from manpp_kernels.models import CifarResNet, resnet32, resnet110
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


def test_a_chain_counted_by_hand() -> None:
    x = torch.randn(10, requires_grad=True)  # 40 bytes
    with SavedTensorMeter() as meter:
        y = x.exp()  # saves its output: 40 bytes
        assert meter.live_bytes == 40
        z = y.sin()  # saves its input, y again: the storage counts once
        assert meter.live_bytes == 40
        w = z * z  # saves z twice: 40 bytes more
        assert meter.live_bytes == 80
        loss = w.sum()  # saves nothing
        assert (meter.live_bytes, meter.peak_bytes) == (80, 80)
        loss.backward()
        assert (meter.live_bytes, meter.peak_bytes) == (0, 80)


def test_the_gradient_is_what_it_is_without_the_meter() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def f() -> torch.Tensor:
        return F.relu(x @ w, inplace=True).exp().square().sum()

    expected = torch.autograd.grad(f(), (x, w))
    with SavedTensorMeter([w]):
        found = torch.autograd.grad(f(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_views_count_their_whole_storage_once() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    with SavedTensorMeter() as meter:
        y = x.exp()
        a, b = y[:4].sin(), y[4:].sin()
        assert meter.live_bytes == 8 * 4 * 4
        del a
        assert meter.live_bytes == 8 * 4 * 4
        del b, y
    assert meter.live_bytes == 0


def test_excluded_storages_do_not_count() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 5))
    x = torch.randn(2, 5)
    with SavedTensorMeter([weight]) as meter:
        y = (x @ weight) @ weight
    assert meter.live_bytes == (x.numel() + (x @ weight).numel()) * 4
    del y
    assert meter.live_bytes == 0


def test_a_graph_freed_and_another_recorded_gives_the_larger_peak() -> None:
    with SavedTensorMeter() as meter:
        for n in (100, 300, 200):
            x = torch.randn(n, requires_grad=True)
            x.exp().sum().backward()
            assert meter.live_bytes == 0
    assert meter.peak_bytes == 300 * 4


def test_a_pool_keeps_nothing_and_equals_pytorchs() -> None:
    shapes = (((2, 3, 32, 32), 8), ((2, 3, 12, 8), 4), ((2, 3, 9, 7), 4), ((2, 3, 4, 4), 4))
    formats = (torch.contiguous_format, torch.channels_last)
    for pool, (shape, size), layout in itertools.product((AveragePool, HeadPool), shapes, formats):
        x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        with SavedTensorMeter([x]) as meter:
            y = pool(size)(x)
        assert meter.live_bytes == 0
        expected = F.adaptive_avg_pool2d(x, size)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert pool is AveragePool or y.is_contiguous(memory_format=torch.channels_last)
        g = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, x, g)[0])
        assert grad.is_contiguous(memory_format=layout) or 9 in shape  # PyTorch's own pool, where sides do not divide
    for pool in (AveragePool, HeadPool):
        for layout in formats:
            x = torch.randn(1, 2, 4, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
            assert torch.autograd.gradcheck(pool(2), x)
            assert torch.autograd.gradgradcheck(pool(2), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_global_pool_keeps_the_format_of_its_features(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y, expected = GlobalAveragePool()(x), F.adaptive_avg_pool2d(x, 1).flatten(1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, g)[0])
    assert grad.is_contiguous(memory_format=layout)  # PyTorch's own is contiguous, whatever the features are


def test_a_step_leaves_nothing_alive() -> None:
    for config in (
        TrainerConfig(rule="e2e"),
        TrainerConfig(),
        TrainerConfig(order="unlocked", rule_options={"form": "parameter"}),
    ):
        trainer = LocalTrainer(CifarResNet((1, 1, 1)), config, example=(3, 16, 16))
        memory = measure_step_memory(trainer, (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])))
        assert memory.saved_peak > 0
        assert memory.saved_after == 0
        assert memory.allocator_peak is None


def test_what_a_step_leaves_alive() -> None:
    kept = []

    def criterion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kept.append(logits.exp())  # in a graph that nobody goes back through
        return F.cross_entropy(logits, targets)

    trainer = LocalTrainer(CifarResNet((1, 1, 1)), TrainerConfig(rule="e2e"), example=(3, 16, 16), criterion=criterion)
    memory = measure_step_memory(trainer, (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])))
    assert memory.saved_after == sum(t.untyped_storage().nbytes() for t in kept) > 0


def test_only_one_block_is_alive_at_a_time() -> None:
    """The peak of the whole step is the largest of the blocks' peaks, each measured on its own."""
    trainer = LocalTrainer(CifarResNet((2, 2, 2)), TrainerConfig(rule="dgl"), example=(3, 16, 16))
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    peaks, x = [], images
    for block in trainer.network:
        with SavedTensorMeter(trainer.persistent_tensors()) as meter:
            out = block(x, images, targets)
            out.loss.backward()
        x = out.features
        peaks.append(meter.peak_bytes)
    assert measure_step_memory(trainer, (images, targets)).saved_peak == max(peaks)


@functools.cache
def _peak(name: str, rule: str, form: str) -> int:
    model = {"resnet32": resnet32, "resnet110": resnet110}[name]()
    config = TrainerConfig(rule=rule, rule_options={"form": form} if rule == "man++" else None)
    trainer = LocalTrainer(model, config, example=(3, 32, 32))
    return measure_step_memory(trainer, (torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))).saved_peak


@pytest.mark.parametrize(
    ("model", "form", "most"),
    [
        ("resnet32", "activation", 0.45),
        ("resnet32", "parameter", 0.35),
        ("resnet110", "activation", 0.13),
        ("resnet110", "parameter", 0.10),
    ],
)
def test_the_share_of_end_to_end(model: str, form: str, most: float) -> None:
    # 8 images and not 128: what is saved goes with the batch, so the share is the same to a tenth of a percent of e2e.
    assert _peak(model, "man++", form) / _peak(model, "e2e", "") <= most
