"""InfoPro, alone and as the host of MAN and MAN++, against a second implementation; its errors and sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from naive_local import batch_norm, below, cross_entropy, unit
from naive_rules import NaiveRule, assert_steps_agree, auxiliary_sizes, conv, make_pair, small_batch, small_model
from torch import nn

from manpp_kernels.local import make_rule
from manpp_kernels.local.decoder import Decoder
from manpp_kernels.local.losses import supervised_contrastive
from manpp_kernels.local.rules.infopro import InfoProOptions, infopro_head, weight_at
from manpp_kernels.models import resnet32, resnet110
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


def resize_matrix(size: int, out: int) -> torch.Tensor:
    """Linear interpolation with aligned corners, as a matrix (out, size)."""
    m = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        at = i * (size - 1) / (out - 1)
        low = min(int(at), size - 2)
        m[i, low], m[i, low + 1] = 1 - (at - low), at - low
    return m


def contrastive(z, targets, temperature):
    z = z / z.pow(2).sum(1, keepdim=True).sqrt()
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positive = [a for a in others if targets[a] == targets[i]]
        if positive:
            below_line = sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
            terms.append(-sum(torch.log(torch.exp(z[i] @ z[p] / temperature) / below_line) for p in positive))
            terms[-1] = terms[-1] / len(positive)
    return sum(terms) / len(terms)


class NaiveInfoPro(NaiveRule):
    loss_name = "cross-entropy"
    weights = ((5.0, 0.2), (0.05, 0.5))
    mean, std = torch.zeros(3), torch.ones(3)
    temperature = 0.07

    def decoder_loss(self, x, p):
        x = resize_matrix(x.shape[2], 16) @ x @ resize_matrix(x.shape[3], 16).T
        x = batch_norm(conv(x, p["layers.0.weight"]), p["layers.1.weight"], p["layers.1.bias"]).clamp(min=0)
        q = 1 / (1 + torch.exp(-conv(x, p["layers.3.weight"], p["layers.3.bias"])))
        image = self.images * self.std.view(3, 1, 1) + self.mean.view(3, 1, 1)
        return -(image * q.log() + (1 - image) * (1 - q).log()).mean()

    def head_loss(self, x, p, targets):
        stride = 2 if x.shape[1] < 64 else 1
        x = batch_norm(conv(x, p["0.weight"], stride=stride), p["1.weight"], p["1.bias"]).clamp(min=0).mean((2, 3))
        x = (x @ p["5.weight"].T + p["5.bias"]).clamp(min=0)
        x = x @ p["7.weight"].T + p["7.bias"]
        return (
            cross_entropy(x, targets)
            if self.loss_name == "cross-entropy"
            else contrastive(x, targets, self.temperature)
        )

    def host_loss(self, j, x, targets, p):
        (a0, a1), (b0, b1) = self.weights
        t = j / (len(self.blocks) - 2)
        return (a0 + (a1 - a0) * t) * self.decoder_loss(x, below(p, "decoder")) + (b0 + (b1 - b0) * t) * self.head_loss(
            x, below(p, "head"), targets
        )

    def auxiliary_loss(self, j, x, targets, a):
        if self.kind == "head":
            return self.host_loss(j, x, targets, a)
        lb, ema = unit(x, below(a, "transform.lb")), unit(x, below(a, "transform.ema"))
        s = a.get("transform.scale", 1.0)
        return self.host_loss(j, s * lb + (2 - s) * ema, targets, below(a, "host"))


@pytest.mark.parametrize("options", [{}, {"loss": "contrastive"}, {"loss": "contrastive", "temperature": 0.2}], ids=str)
@pytest.mark.parametrize("order", ["published", "unlocked"])
def test_a_step_equals_the_naive_implementation(options: dict, order: str) -> None:
    trainer, naive = make_pair(NaiveInfoPro, TrainerConfig(rule="infopro", rule_options=options, order=order))
    naive.loss_name, naive.temperature = options.get("loss", "cross-entropy"), options.get("temperature", 0.07)
    assert_steps_agree(trainer, naive)


@pytest.mark.parametrize("rule", ["man", "man++"])
def test_a_step_as_a_host(rule: str) -> None:
    """With the published weights of a host: 5 to 0 and 0.5 to 0."""
    options = {"host": "infopro", "host_options": {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}}
    trainer, naive = make_pair(NaiveInfoPro, TrainerConfig(rule=rule, rule_options=options), kind="sum")
    naive.weights = ((5.0, 0.0), (0.5, 0.0))
    naive.mean, naive.std = torch.tensor((0.1, 0.2, 0.3)), torch.tensor((0.5, 0.6, 0.7))
    # The network is given images that were normalised, and the decoder undoes it.
    mean, std = naive.mean.view(3, 1, 1), naive.std.view(3, 1, 1)
    ours, theirs = trainer.step, naive.step
    trainer.step = lambda batch: ours(((batch[0] - mean) / std, batch[1]))
    naive.step = lambda images, targets: theirs((images - mean) / std, targets)
    assert_steps_agree(trainer, naive)


def test_weights_move_linearly_over_the_blocks() -> None:
    assert [weight_at((5.0, 0.2), i, 16) for i in (0, 7, 14)] == pytest.approx([5.0, 2.6, 0.2])
    assert weight_at(0.75, 3, 16) == 0.75
    assert weight_at((5.0, 0.0), 0, 2) == 5.0


def test_splits_of_equal_memory() -> None:
    config = TrainerConfig(rule="infopro", blocks=3, balance="memory")
    trainer = LocalTrainer(small_model(), config, example=(3, 16, 16))
    assert len(trainer.step(small_batch()).losses) == 3


def test_contrastive_leaves_out_what_is_alone_of_its_class() -> None:
    z = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    alone = supervised_contrastive(z, torch.arange(4))
    assert alone.item() == 0
    assert torch.autograd.grad(alone, z)[0].abs().sum() == 0
    targets = torch.tensor([0, 1, 0, 2])
    torch.testing.assert_close(supervised_contrastive(z, targets, 0.5), contrastive(z, targets, 0.5))
    with pytest.raises(ValueError, match="contrastive loss needs class numbers"):
        supervised_contrastive(z, torch.rand(4, 3))


def test_contrastive_without_ignored_images_and_without_others() -> None:
    z = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, -100, 1, 0, -100, 1, 2])
    counted = targets != -100
    loss = supervised_contrastive(z, targets, 0.5, -100)
    torch.testing.assert_close(loss, contrastive(z[counted], targets[counted], 0.5))
    assert torch.autograd.grad(loss, z)[0][~counted].abs().sum() == 0
    for few in (torch.tensor([-100, 1]), torch.tensor([-100, -100]), torch.tensor([1])):
        z = torch.randn(len(few), 8, dtype=torch.float64, requires_grad=True)
        loss = supervised_contrastive(z, few, 0.5, -100)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, z)[0].abs().sum() == 0


def test_losses_in_bfloat16_autocast() -> None:
    for rule, options in (("infopro", {"loss": "contrastive"}), ("man++", {"host": "infopro"})):
        config = TrainerConfig(rule=rule, rule_options=options, amp="bf16")
        trainer = LocalTrainer(small_model().float(), config, example=(3, 16, 16))
        images, targets = small_batch()
        assert all(math.isfinite(loss) for loss in trainer.step((images.float(), targets)).losses)


# Written out: convolution and its batch normalisation, two linear layers; and the decoder on C channels.
def head_size(c: int, width: int, outputs: int) -> int:
    return 9 * c * width + 2 * width + (width + 1) * 128 + (128 + 1) * outputs


def decoder_size(c: int) -> int:
    return 9 * c * 12 + 2 * 12 + 9 * 12 * 3 + 3


SIZES = {(16, 10): 12265, (32, 10): 31977, (64, 10): 53865, (16, 128): 27487, (32, 128): 47199, (64, 128): 69087}


def test_the_table_is_the_formula() -> None:
    for (c, outputs), size in SIZES.items():
        assert size == head_size(c, {16: 32, 32: 64, 64: 64}[c], outputs) + decoder_size(c)


@pytest.mark.parametrize(("make", "per_stage"), [(resnet32, 5), (resnet110, 18)])
@pytest.mark.parametrize(("loss", "outputs"), [("cross-entropy", 10), ("contrastive", 128)])
def test_sizes_of_the_published_networks(make, per_stage: int, loss: str, outputs: int) -> None:
    # The stem and the first stage, the second stage, the third without its last unit.
    expected = [SIZES[16, outputs]] * (per_stage + 1) + [SIZES[32, outputs]] * per_stage
    expected += [SIZES[64, outputs]] * (per_stage - 1)
    assert auxiliary_sizes("infopro", {"loss": loss}, make()) == expected


@pytest.mark.parametrize(
    ("channels", "width", "stride"), [(16, 32, 2), (32, 64, 2), (48, 64, 2), (64, 64, 1), (256, 256, 1), (2048, 512, 1)]
)
def test_the_convolution_of_the_head(channels: int, width: int, stride: int) -> None:
    """How many parameters it has does not tell its stride."""
    convolution = infopro_head(torch.Size((2, channels, 8, 8)), 10)[0]
    assert (convolution.out_channels, convolution.stride) == (width, (stride, stride))


def test_sizes_as_the_host_of_man_plus_plus() -> None:
    """A trainable copy of the next unit, s, and the host on what the unit gives."""
    plain = {c: 2 * (9 * c * c + 2 * c) for c in (16, 32, 64)}
    down = {c: 9 * (c // 2) * c + 9 * c * c + (c // 2) * c + 6 * c for c in (32, 64)}
    expected = [plain[16] + 1 + 12265] * 5 + [down[32] + 1 + 31977] + [plain[32] + 1 + 31977] * 4
    expected += [down[64] + 1 + 53865] + [plain[64] + 1 + 53865] * 4
    assert auxiliary_sizes("man++", {"host": "infopro"}, resnet32()) == expected
    assert (plain[16], down[32], plain[64], sum(expected)) == (4672, 14528, 73984, 956342)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss has to be one of cross-entropy, contrastive"),
        ({"temperature": 0.0}, "temperature has to be positive"),
        ({"decoder_weight": (1, 2, 3)}, "decoder_weight has to be a number from 0 on, or those of the first"),
        ({"classifier_weight": -1.0}, "classifier_weight has to be 0 or more, and is -1"),
        ({"classifier_weight": math.inf}, "classifier_weight has to be finite, and is inf"),
        ({"decoder_weight": [5.0, math.nan]}, "decoder_weight has to be 0 or more, and is nan"),
        ({"mean": [0.5, math.nan]}, "mean has to be finite, and is nan"),
        ({"std": [math.inf]}, "std has to be finite, and is inf"),
        ({"std": [0.5, 0.0]}, r"std has to be positive, and is 0\.0"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rule("infopro", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_weight": True}, "decoder_weight has to be a number, and is True"),
        ({"classifier_weight": "1"}, "classifier_weight has to be a number, and is '1'"),
        ({"classifier_weight": (1, None)}, "classifier_weight has to be a number, and is None"),
        ({"mean": 0.5}, r"mean has to be a sequence of numbers, one for each channel, and is 0\.5"),
        ({"std": ["0.5"]}, r"std has to be a number, and is '0\.5'"),
    ],
)
def test_options_of_another_kind(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_rule("infopro", options)


@pytest.mark.parametrize("given", [[0.5, 0.25], np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])], ids=type)
def test_numbers_for_each_channel_come_as_any_sequence(given: Any) -> None:
    options = InfoProOptions(mean=given, std=given)
    assert options.mean == options.std == (0.5, 0.25)


def test_images_that_were_normalised_need_mean_and_std() -> None:
    trainer = LocalTrainer(small_model(), TrainerConfig(rule="infopro"), example=(3, 16, 16))
    images, targets = small_batch()
    with pytest.raises(ValueError, match="set the options mean and std of the rule infopro"):
        trainer.step((images * 4 - 2, targets))
    with pytest.raises(ValueError, match="mean has to be one number for each of the 3 channels"):
        LocalTrainer(
            small_model(), TrainerConfig(rule="infopro", rule_options={"mean": (0.5, 0.5)}), example=(3, 16, 16)
        )


def test_images_that_pass_the_ends_by_rounding_are_cut() -> None:
    shape = torch.Size((4, 3, 8, 8))
    decoder = Decoder(shape, shape)
    features, images = torch.rand(shape), torch.rand(shape) * 1.02 - 0.01
    decoder.before_forward(images)
    assert images.max() > 1
    assert images.min() < 0
    assert torch.equal(decoder(features, images), decoder(features, images.clamp(0, 1)))


def test_inputs_that_are_no_images() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"reconstructs images \(N, C, H, W\), and the model's inputs are \(N, 6\)"):
        LocalTrainer(model, TrainerConfig(rule="infopro"), example=torch.randn(2, 6))


class Centre(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x if self.in_place else x.clone()).sub_(0.5)


@pytest.mark.parametrize("config", [{}, {"accumulate": 2}, {"order": "unlocked"}], ids=str)
def test_the_images_to_rebuild_are_those_given_where_the_stem_changes_them_in_place(config: dict) -> None:
    results = []
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for in_place in (False, True):
        torch.manual_seed(0)
        layers = [part for width in (3, 4, 4) for part in (nn.Conv2d(width, 4, 3, padding=1), nn.ReLU())]
        model = nn.Sequential(Centre(in_place), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        trainer = LocalTrainer(model, TrainerConfig(rule="infopro", blocks=3, **config), example=images)
        given = images.clone()
        results.append([loss for _ in range(2) for loss in trainer.step((given, torch.arange(8) % 4)).losses])
        assert torch.equal(given, images)
    torch.testing.assert_close(*results)
