"""The published settings by name: that each can be trained, and that the command line takes them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from naive_rules import small_batch, small_model

from manpp_kernels.local import adapt, make_rule, partition
from manpp_kernels.local.rules import with_normalization
from manpp_kernels.models import MODELS
from manpp_kernels.recipes import RECIPES, recipe
from manpp_kernels.trainer import LocalTrainer


def test_a_recipe_has_all_of_a_published_run() -> None:
    found = recipe("man++/cifar10/resnet32-k16")
    assert found.settings() == {
        "data": "cifar10",
        "image_size": 32,
        "crop": 4,
        "flip": True,
        "model": "resnet32",
        "epochs": 400,
        "batch_size": 1024,
        "optimizer": "sgd",
        "optimizer_arg": {"momentum": 0.9, "nesterov": True},
        "lr": 0.8,
        "weight_decay": 1e-4,
        "schedule": "cosine",
        "rule": "man++",
        "blocks": 16,
    }
    rule = make_rule(found.rule, found.rule_options)
    assert (rule.options.host, rule.host.options.width, rule.options.momentum) == ("dgl", "wide", 0.995)
    stl10 = recipe("infopro/stl10/resnet110-k32")
    assert (stl10.image_size, stl10.learning_rate, stl10.batch_size, stl10.blocks) == (96, 0.1, 128, 32)
    svhn = recipe("auglocal/svhn/resnet110-k55")
    assert (svhn.crop, svhn.flip, svhn.rule_options) == (2, False, {"auxiliary_depth": 3})
    imagenet = recipe("man++-infopro/imagenet/resnet152-k4")
    assert (imagenet.learning_rate, imagenet.epochs, imagenet.blocks) == (
        0.4,
        90,
        ("layer2.6", "layer3.13", "layer3.25"),
    )
    host = make_rule(imagenet.rule, imagenet.rule_options).host.options
    assert (host.decoder_weight, host.classifier_weight) == (5.0, 0.75)


def test_the_sets_of_images_come_with_the_published_augmentation() -> None:
    """Which ``manpp train --data`` has without a recipe, too."""
    pytest.importorskip("torchvision")
    from manpp_kernels.data.datasets import DATASETS

    sets = {found.data: found for found in RECIPES.values() if found.data is not None}
    assert sorted(sets) == ["cifar10", "stl10", "svhn"]
    for name, found in sets.items():
        info = DATASETS[name]
        assert (info.size, info.crop, info.flip) == (found.image_size, found.crop, found.flip)


def test_every_recipe_fits_its_rule_and_its_network() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    from manpp_kernels.cli.training import build_model

    networks = {}
    for found in RECIPES.values():
        make_rule(found.rule, found.rule_options)
        if found.model not in networks:
            with torch.device("meta"):
                networks[found.model] = list(adapt(build_model(found.model, 1000)).units)
        units = networks[found.model]
        if isinstance(found.blocks, int):
            assert 1 <= found.blocks <= len(units) + 1
        else:
            places = [units.index(name) for name in found.blocks]
            assert places == sorted(places)
            assert found.name.endswith(f"-k{len(places) + 1}")


def test_the_vision_transformers() -> None:
    timm = pytest.importorskip("timm")
    found = recipe("man++/imagenet/vit_tiny_patch16_224-k4")
    options = found.settings()
    assert (options["optimizer"], options["lr"], options["batch_size"], options["epochs"]) == ("adamw", 1e-3, 1024, 90)
    assert "optimizer_arg" not in options
    assert found.trainer_config().rule_options == {"auxiliary_depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    with pytest.raises(ValueError, match=r"no learning rate, .* give the trainer an optimizer"):
        LocalTrainer(model, found.trainer_config(), example=(3, 32, 32))
    trainer = LocalTrainer(model, found.trainer_config(), example=(3, 32, 32), optimizer=found.optimizer)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-3, 1e-2)
    names = trainer.network.partition.names()
    assert names == [["stem", "blocks.1", "blocks.2"], *([f"blocks.{i + j}" for j in range(3)] for i in (3, 6, 9))]
    # In front of the head: the two copies of the first block of the next group, and a copy of the one behind it.
    assert len(trainer.network.blocks[0].auxiliary.host.transform) == 1
    assert len(trainer.step((torch.rand(4, 3, 32, 32), torch.arange(4))).losses) == 4


def test_one_segment_a_block_is_16_and_55() -> None:
    for name, k in (("resnet32", 16), ("resnet110", 55)):
        parts = partition(MODELS[name](), recipe(f"dgl/cifar10/{name}-k{k}").blocks, example=(3, 8, 8))
        assert {len(block) for block in parts.blocks} == {1}


@pytest.mark.parametrize("rule", ["man++", "infopro", "mlaan"])
def test_the_trainers_part_of_a_recipe(rule: str) -> None:
    published = recipe(f"{rule}/cifar10/resnet32-k16")
    found = published.trainer_config()
    made = published.optimizer([torch.nn.Parameter(torch.ones(1))]).defaults
    assert (made["lr"], made["momentum"], made["nesterov"], made["weight_decay"]) == (0.8, 0.9, True, 1e-4)
    assert (found.learning_rate, found.sgd_momentum, found.nesterov, found.weight_decay) == (0.8, 0.9, True, 1e-4)
    # The same rule on a network of five segments.
    trainer = LocalTrainer(small_model(), dataclasses.replace(found, blocks=5), example=(3, 16, 16))
    assert len(trainer.step(small_batch()).losses) == 5


def test_a_name_that_is_none() -> None:
    with pytest.raises(
        ValueError, match=r"no recipe 'man\+\+/cifar10/resnet32'; did you mean man\+\+/cifar10/resnet32-k8"
    ):
        recipe("man++/cifar10/resnet32")
    with pytest.raises(ValueError, match="names are like e2e/cifar10/resnet32"):
        recipe("xyz")


def test_normalization_goes_to_the_rule_that_asks() -> None:
    mean, std = (0.5,), (0.25,)
    asked = {"mean": mean, "std": std}
    assert with_normalization("dgl", None, mean, std) is None
    assert with_normalization("man++", {"momentum": 0.9}, mean, std) == {"momentum": 0.9}
    assert with_normalization("infopro", None, mean, std) == asked
    assert with_normalization("infopro", {"mean": (0.1,)}, mean, std) == {"mean": (0.1,), "std": std}
    assert with_normalization("man", {"host": "infopro"}, mean, std) == {"host": "infopro", "host_options": asked}


def test_every_recipe_is_options_of_the_command_line(tmp_path) -> None:
    pytest.importorskip("yaml")
    from manpp_kernels.cli.settings import Settings, from_file

    for found in RECIPES.values():
        settings = Settings.of(found.settings())
        assert settings.trainer.rule == found.rule
        assert settings.run.lr == found.learning_rate
    # What a run leaves in its folder brings the same back.
    settings = Settings.of(recipe("man++-infopro/imagenet/resnet101-k4").settings())
    settings.save(tmp_path / "config.yaml")
    assert Settings.of(from_file(tmp_path / "config.yaml")) == settings


def test_manpp_train_takes_a_recipe(tmp_path) -> None:
    pytest.importorskip("sklearn")
    from manpp_kernels.cli import main

    small = "--data digits --limit 64 --test-limit 32 --image-size 8 --model resnet20 --blocks 3 --epochs 1"
    small += " --batch-size 32 --no-tensorboard --device cpu"
    # InfoPro's decoder learns from the loader what the images were normalised with.
    recipe_and_folder = ["--recipe", "man++-infopro/cifar10/resnet32-k16", "--out", str(tmp_path / "run")]
    assert main(["train", *recipe_and_folder, *small.split()]) == 0
    assert "lr: 0.8" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "given", "left_out"),
    [
        ("man++/cifar10/resnet32-k16", {"optimizer": "adamw"}, {"optimizer_arg", "lr", "weight_decay"}),
        ("man++/imagenet/vit_tiny_patch16_224-k4", {"optimizer": "sgd"}, {"lr", "weight_decay"}),
        ("man++/cifar10/resnet32-k16", {"optimizer": "SGD"}, set()),
        ("man++-infopro/imagenet/resnet101-k4", {"host": "dgl"}, {"host_options"}),
        ("man++-infopro/imagenet/resnet101-k4", {"host": "infopro"}, set()),
        ("man++-infopro/imagenet/resnet101-k4", {"rule": "dgl"}, {"host", "host_options"}),
        ("man++/cifar10/resnet32-k16", {"data": "digits"}, {"crop", "flip", "image_size"}),
        ("man++/cifar10/resnet32-k16", {"data": "cifar10"}, set()),
        ("man++-infopro/imagenet/resnet101-k4", {"data": "digits"}, {"flip", "image_size"}),
    ],
)
def test_what_belongs_to_the_recipes_own_goes_with_it(name: str, given: dict, left_out: set[str]) -> None:
    from manpp_kernels.cli.recipe import default_lr, optimizer_factory
    from manpp_kernels.cli.settings import Settings
    from manpp_kernels.cli.train import _by_recipe

    if recipe(name).data is None:
        given = {"data": "folder:photos", **given}
    options, published = _by_recipe(name, given), recipe(name).settings()
    assert options == {**{key: value for key, value in published.items() if key not in left_out}, **given}
    run = Settings.of(options).run
    optimizer_factory(run.optimizer, default_lr(run.optimizer, 128), run.weight_decay, run.optimizer_arg)
    # What the command line gives in their place is kept.
    asked = {"lr": 0.5, "weight_decay": 0.25, "optimizer_arg": {}, "flip": True, "crop": 3}
    assert _by_recipe(name, {**given, **asked}).items() >= asked.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "nothing/like/this"], "there is no recipe"),
        (["--recipe", "man++-infopro/imagenet/resnet101-k4"], "needs the folder of its images: --data folder:PATH"),
        (["--recipe", "dgl/svhn/resnet32-k8", "--resume", "somewhere"], "leave out --recipe"),
    ],
)
def test_recipes_that_the_command_line_refuses(words: list[str], message: str, capsys) -> None:
    from manpp_kernels.cli import main

    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
