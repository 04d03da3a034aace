"""What the second implementations of single rules share: a training step on dictionaries of tensors, and the checks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from naive_local import Naive, Sgd, below
from test_rules import compare, gradients_by_name

from manpp_kernels.local import LocalNetwork, make_rule, partition
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

OPTIMIZER = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
BLOCKS = [["stem"], ["layer1.0"], ["layer2.0"], ["layer2.1"], ["layer3.0"]]
STATE = ("running", "batches")


def small_model() -> CifarResNet:
    return CifarResNet((1, 2, 1), num_classes=5, widths=(4, 8, 16)).double()


def small_batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 16, 16, dtype=torch.float64), torch.randint(0, 5, (n,))


class NaiveRule(Naive):
    """A training by a rule whose subclass writes down ``auxiliary_loss``."""

    images: torch.Tensor

    def auxiliary_loss(self, j, x, targets, a):
        raise NotImplementedError

    def loss(self, j, x, targets, p, a):
        if j == len(self.blocks) - 1:
            return super().loss(j, x, targets, p, a)
        for name in self.blocks[j]:
            x = self.segment(name, x, p)
        return x, self.auxiliary_loss(j, x, targets, below(a, str(j)))

    def step(self, images, targets):
        self.images = images
        return super().step(images, targets)


def make_pair(naive, config: TrainerConfig, kind: str = "head", **more) -> tuple[LocalTrainer, Naive]:
    """The trainer, and the naive implementation with the same state."""
    trainer = LocalTrainer(small_model(), config, example=(3, 16, 16), optimizer=OPTIMIZER)
    return trainer, naive(
        {k: v.clone() for k, v in trainer.model.state_dict().items()},
        {k: v.clone() for k, v in trainer.network.auxiliary_state_dict().items()},
        BLOCKS,
        Sgd(),
        kind,
        order=config.order,
        **more,
    )


def assert_steps_agree(trainer: LocalTrainer, naive: Naive, steps: int = 2) -> None:
    """Losses, every gradient, EMAs, and parameters after the optimizer, value for value."""
    seen = gradients_by_name(trainer)
    for step in range(steps):
        images, targets = small_batch()
        seen.clear()
        result = trainer.step((images, targets))
        losses, gradients = naive.step(images, targets)
        compare(dict(enumerate(result.losses)), dict(enumerate(losses)), step)
        assert set(seen) == set(gradients)
        compare(seen, gradients, step)
        compare(trainer.model.state_dict(), naive.model, step)
        trained = {k: v for k, v in naive.auxiliary.items() if not any(word in k for word in STATE)}
        assert trained
        compare(trainer.network.auxiliary_state_dict(), trained, step)


def conv(x, weight, bias=None, stride=1):
    """A 3x3 convolution with a border of one."""
    return F.conv2d(x, weight, bias, stride, 1)


def auxiliary_sizes(rule: str, options, model: torch.nn.Module, blocks=None) -> list[int]:
    """Trainable auxiliary parameters of each block but the last, for images of 32x32."""
    network = LocalNetwork(
        partition(model, blocks, example=(3, 32, 32)), make_rule(rule, options), torch.nn.functional.cross_entropy
    )
    return [
        sum(p.numel() for p in block.auxiliary.parameters() if p.requires_grad)
        for block in network
        if block.auxiliary is not None
    ]
