"""Units that run once more in the backward pass, in the cases where that is more than running them again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from manpp_kernels.local.recompute import Recomputed
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(8) % 4


def trained(model: nn.Module, recompute: bool, **config) -> tuple[LocalTrainer, list[torch.Tensor]]:
    """A trainer after three steps, and all losses of these."""
    torch.manual_seed(1)
    trainer = LocalTrainer(model, TrainerConfig(learning_rate=0.01, recompute=recompute, **config), example=(3, 8, 8))
    return trainer, [loss for _ in range(3) for loss in trainer.step(batch()).losses]


def assert_alike(make, **config) -> None:
    (plain, a), (again, b) = (trained(make(), recompute, **config) for recompute in (False, True))
    assert any(isinstance(m, Recomputed) for m in again.network.modules())
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plain.export_state_dict(), again.export_state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [{"rule": "e2e"}, {"rule": "dgl", "blocks": 3}, {"rule": "mlaan", "blocks": 3}])
def test_whole_units_may_be_frozen(config: dict) -> None:
    def frozen() -> nn.Module:
        torch.manual_seed(0)
        model = CifarResNet((2, 2, 1), num_classes=4, widths=(4, 6, 8))
        for part in (model.conv1, model.bn1, model.layer1):
            part.requires_grad_(False)
        return model

    assert_alike(frozen, **config)


def test_a_frozen_unit_runs_again_where_a_gradient_passes_it() -> None:
    runs: list[nn.Module] = []
    unit = nn.Linear(4, 4).requires_grad_(False)
    unit.register_forward_hook(lambda module, *_: runs.append(module))
    Recomputed(unit)(torch.rand(2, 4, requires_grad=True)).sum().backward()
    assert len(runs) == 2
    assert not Recomputed(unit)(torch.rand(2, 4)).requires_grad
    assert len(runs) == 3


def test_a_unit_draws_the_same_random_numbers_the_second_time() -> None:
    x = torch.ones(200, requires_grad=True)
    y = Recomputed(nn.Dropout(0.5))(x)
    after = torch.get_rng_state()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)  # 2 or 0
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("normalised", [parametrizations.spectral_norm, spectral_norm], ids=["parametrization", "hook"])
@pytest.mark.parametrize(
    "config",
    [
        {"rule": "dgl", "blocks": 2},
        {"rule": "dgl", "blocks": 2, "accumulate": 2},
        {"rule": "mlaan", "rule_options": {"lb_init": "copy"}},
    ],
)
def test_a_power_iteration_goes_on_once_a_step(normalised, config: dict) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            layer
            for width in (3, 4, 4, 4)
            for layer in (normalised(nn.Conv2d(width, 4, 3, padding=1, bias=False)), nn.ReLU())
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

    assert_alike(model, **config)


class DrawingOnTheHost(nn.Module):
    """Stochastic depth by the host's random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if torch.rand(()) < 0.5 else x * 2


@pytest.mark.parametrize("draws", [nn.Dropout(0.1), DrawingOnTheHost()])
def test_a_unit_in_a_graph_draws_no_random_numbers(draws: nn.Module) -> None:
    unit = Recomputed(nn.Sequential(nn.Linear(4, 4), draws))
    x = torch.randn(2, 4)
    unit(x).sum().backward()  # anywhere else it may
    unit.capturable = True
    with pytest.raises(RuntimeError, match=r"a unit \(Sequential\) draws random numbers"):
        unit(x)
    with torch.no_grad():  # nothing is recomputed
        unit(x)
    unit.unit[1] = nn.Identity()
    unit(x).sum().backward()
