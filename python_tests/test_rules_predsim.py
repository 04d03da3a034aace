"""PredSim against a second implementation; its sizes and errors."""

from __future__ import annotations

import pytest
import torch
from naive_local import cross_entropy
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, conv, make_pair, small_batch, small_model

from manpp_kernels.local import make_rule
from manpp_kernels.local.losses import similarity_matching
from manpp_kernels.local.rules.predsim import pooled_size
from manpp_kernels.models import resnet32, resnet110
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


def similarities(v):
    rows = [r - r.mean() for r in v]
    return torch.stack([torch.stack([(a @ b) / (a.norm() * b.norm()) for b in rows]) for a in rows])


class NaivePredSim(NaiveRule):
    weight, limit = 0.99, 1024

    def auxiliary_loss(self, j, x, targets, a):
        v = conv(x, a["similarity.project.weight"]).flatten(2)
        v = ((v - v.mean(2, keepdim=True)).square().sum(2) / (v.shape[2] - 1)).sqrt()
        onehot = torch.eye(5, dtype=torch.float64)[targets]
        matching = (similarities(v) - similarities(onehot)).square().mean()
        n, c, h, w = x.shape
        rows, columns = h, w
        while c * rows * columns > self.limit:
            rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
        flat = x.reshape(n, c, rows, h // rows, columns, w // columns).mean((3, 5)).flatten(1)
        logits = flat @ a["head.2.weight"].T + a["head.2.bias"]
        return self.weight * matching + (1 - self.weight) * cross_entropy(logits, targets)


@pytest.mark.parametrize("order", ["published", "unlocked"])
@pytest.mark.parametrize(("weight", "limit"), [(0.99, 1024), (0.3, 128)])
def test_a_step_equals_the_naive_implementation(weight: float, limit: int, order: str) -> None:
    options = {"similarity_weight": weight, "linear_inputs": limit}
    trainer, naive = make_pair(NaivePredSim, TrainerConfig(rule="predsim", rule_options=options, order=order))
    naive.weight, naive.limit = weight, limit
    assert_steps_agree(trainer, naive)


@pytest.mark.parametrize(
    ("shape", "limit", "pooled"),
    [
        ((16, 32, 32), 1024, (8, 8)),
        ((32, 16, 16), 1024, (4, 8)),
        ((64, 8, 8), 1024, (4, 4)),
        ((16, 32, 32), 2048, (8, 16)),
        ((3, 7, 5), 20, (2, 3)),
        ((2048, 7, 7), 1024, (1, 1)),
        ((4, 3, 3), 1024, (3, 3)),
    ],
)
def test_pooled_sizes(shape: tuple[int, int, int], limit: int, pooled: tuple[int, int]) -> None:
    assert pooled_size(*shape, limit) == pooled


# Written out: 9 C^2 of the convolution, and 1025 values for each of ten classes.
SIZES = {16: 2304 + 10250, 32: 9216 + 10250, 64: 36864 + 10250}


@pytest.mark.parametrize(("make", "per_stage"), [(resnet32, 5), (resnet110, 18)])
def test_sizes_of_the_published_networks(make, per_stage: int) -> None:
    expected = [SIZES[16]] * (per_stage + 1) + [SIZES[32]] * per_stage + [SIZES[64]] * (per_stage - 1)
    assert auxiliary_sizes("predsim", None, make()) == expected


def test_matching_without_ignored_images() -> None:
    v, targets = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, -100, 2, 0, -100, 1])
    counted = targets != -100
    expected = similarity_matching(v[counted], targets[counted], 3)
    torch.testing.assert_close(similarity_matching(v, targets, 3, -100), expected)
    assert similarity_matching(v, torch.full((6,), -100), 3, -100).item() == 0
    torch.testing.assert_close(similarity_matching(v[counted], targets[counted].to(torch.uint8), 3), expected)


def test_labels_as_probabilities_are_the_same_as_classes() -> None:
    v, targets = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1])
    onehot = torch.eye(3, dtype=torch.float64)[targets]
    assert similarity_matching(v, targets, 3).item() == similarity_matching(v, onehot, 3).item()


def test_features_without_any_spread_have_finite_gradients() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="predsim"), example=(3, 16, 16))
    auxiliary = trainer.network.blocks[0].auxiliary
    x = torch.zeros(4, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    auxiliary(x, x, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad.isfinite().all() for p in [x, *auxiliary.parameters()])


def test_vectors_as_features() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 5), torch.nn.Linear(5, 4))
    trainer = LocalTrainer(model, TrainerConfig(rule="predsim"), example=torch.randn(2, 6))
    assert len(trainer.step((torch.randn(8, 6), torch.randint(0, 4, (8,)))).losses) == 2


def test_wrong_options_and_features() -> None:
    with pytest.raises(ValueError, match=r"similarity_weight has to lie in \[0, 1\]"):
        make_rule("predsim", {"similarity_weight": 2.0})
    with pytest.raises(ValueError, match="linear_inputs has to be 1 or more"):
        make_rule("predsim", {"linear_inputs": 0})
    with pytest.raises(ValueError, match="'predsim' cannot be a host; choose from dgl, infopro"):
        make_rule("man++", {"host": "predsim"})
    model = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 1), torch.nn.Conv3d(2, 2, 1), torch.nn.Flatten(), torch.nn.Linear(16, 4)
    )
    with pytest.raises(ValueError, match="PredSim's linear layer takes vectors"):
        LocalTrainer(model, TrainerConfig(rule="predsim"), example=torch.randn(2, 1, 2, 2, 2))


def test_a_batch_of_other_classes_than_the_network_has() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="predsim"), example=(3, 16, 16))
    images, _ = small_batch()
    with pytest.raises(ValueError, match=r"the model has 5 classes .* give the model as many outputs"):
        trainer.step((images, torch.full((12,), 5)))
