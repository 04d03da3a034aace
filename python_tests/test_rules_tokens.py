"""Every rule on a network of tokens: a tiny vision transformer of torchvision's, in blocks."""

from __future__ import annotations

import pytest
import torch

from manpp_kernels.local import partition, rule_names
from manpp_kernels.local.features import TokenMap, TokenPool, has_class_token
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

models = pytest.importorskip("torchvision.models")


def tiny_vit(**options) -> torch.nn.Module:
    settings = {"image_size": 8, "patch_size": 4, "num_layers": 4, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    return models.VisionTransformer(**{**settings, "num_classes": 5, **options}).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (6,))


def test_a_vision_transformer_comes_apart() -> None:
    model = tiny_vit(representation_size=6)
    keys = list(model.state_dict())
    torch.nn.init.normal_(model.heads.head.weight)  # zeros at first, which would hide what comes before
    parts = partition(model, 2, example=(3, 8, 8))
    assert parts.names() == [
        ["stem", "encoder.layers.encoder_layer_1"],
        [f"encoder.layers.encoder_layer_{i}" for i in (2, 3)],
    ]
    assert all(segment.shape == (2, 5, 8) for segment in parts.segments)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_trains_on_tokens(rule: str) -> None:
    model = tiny_vit()
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)
    trainer = LocalTrainer(model, TrainerConfig(rule=rule), example=(3, 8, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = [float(loss) for loss in trainer.step(batch()).losses]
    assert len(first) == (1 if rule == "e2e" else 4)
    assert [k for k, v in model.state_dict().items() if torch.equal(v, before[k])] == []


@pytest.mark.parametrize("options", [{"host": "infopro"}, {"form": "parameter"}, {"parts": "lb"}, {"parts": "ema"}])
def test_man_plus_plus_on_tokens(options: dict) -> None:
    trainer = LocalTrainer(tiny_vit(), TrainerConfig(rule_options=options), example=(3, 8, 8))
    assert all(loss.isfinite() for loss in trainer.step(batch()).losses)


def test_a_fresh_copy_of_a_block_is_drawn_anew() -> None:
    model = tiny_vit()
    trainer = LocalTrainer(model, TrainerConfig(), example=(3, 8, 8))
    lb, unit = trainer.network.blocks[0].auxiliary.transform.lb, model.encoder.layers[1]
    for name in ("self_attention.in_proj_weight", "self_attention.out_proj.weight", "mlp.0.weight"):
        assert not torch.equal(lb.get_parameter(name), unit.get_parameter(name))
        assert lb.get_parameter(name).std().item() == pytest.approx(unit.get_parameter(name).std().item(), rel=0.4)


def test_tokens_with_and_without_a_class_token() -> None:
    assert [t for t in range(1, 30) if has_class_token(t)] == [2, 5, 10, 17, 26]


def test_tokens_as_a_map_and_as_a_vector() -> None:
    """Patches are the rows of a map one after the other; the class token comes before them."""
    image, token = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 3)
    patches = torch.stack([image[:, :, y, x] for y in range(4) for x in range(4)], 1)
    tokens = torch.cat([token, patches], 1)
    assert torch.equal(TokenMap(16)(patches), image)
    assert torch.equal(TokenMap(17)(tokens), image)
    assert torch.equal(TokenPool(17)(tokens), token[:, 0])
    torch.testing.assert_close(TokenPool(16)(patches), image.mean((2, 3)))


def test_tokens_that_form_no_grid() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Flatten(), torch.nn.Linear(12, 4)
    )
    for rule in ("dgl", "predsim", "man++"):
        trainer = LocalTrainer(model, TrainerConfig(rule=rule), example=torch.randn(2, 3, 4))
        assert len(trainer.step((torch.randn(8, 3, 4), torch.randint(0, 4, (8,)))).losses) == 2
    from manpp_kernels.local.features import to_map

    with pytest.raises(ValueError, match="3 tokens form no square grid, with or without a class token"):
        to_map("the decoder", torch.Size((2, 3, 4)))
