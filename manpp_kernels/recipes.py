"""The published settings by name: ``recipe("man++/cifar10/resnet32-k16")``, and ``manpp train --recipe`` with the same.

A name is rule/images/network-kBLOCKS; end-to-end training has no blocks in it. ``man-infopro`` and ``man++-infopro``
are MAN and MAN++ with InfoPro as their host. What the table says:

- CIFAR-10, SVHN and STL-10 (MAN, ECCV 2024; MAN++, arXiv 2507.16279): SGD with Nesterov momentum 0.9, weight decay
  1e-4, 400 epochs of a cosine schedule. Learning rate 0.8 at batch 1024; STL-10 at 96x96, 0.1 at batch 128. Reflected
  crops of 4 pixels and flips; SVHN crops of 2 and no flip. The other rules have the same settings, so that they can be
  compared.
- ImageNet (MAN++ with InfoPro as its host): learning rate 0.4 at batch 1024, 90 epochs, explicit boundaries.
- Vision transformers on ImageNet (MAN++): four blocks of three transformer blocks, two units in an auxiliary network,
  AdamW with learning rate 1e-3 at batch 1024, 90 epochs of a cosine schedule. The networks are timm's. The weight
  decay is AdamW's own in PyTorch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from manpp_kernels.training.config import TrainerConfig


@dataclass(frozen=True)
class Recipe:
    """Everything that a published run was trained with.

    Attributes:
        name: as in ``recipe(name)``.
        rule: of local learning.
        model: the network, as ``manpp train --model`` names it.
        blocks: K, or the last unit of each block but the last.
        data: the images, as ``manpp train --data`` names them; None for ImageNet, whose folder the user gives.
        rule_options: those that differ from the rule's defaults.
        learning_rate, batch_size, weight_decay, epochs: of the optimizer.
        sgd_momentum: of SGD, with Nesterov momentum; None where the optimizer is AdamW.
        schedule: of the learning rate, over all epochs.
        image_size: height and width of the images in pixels.
        crop: pixels that images are shifted by at most, on a reflected border; None for ImageNet's resized crops.
        flip: whether images are mirrored at random.
    """

    name: str
    rule: str
    model: str
    blocks: int | tuple[str, ...]
    data: str | None
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.8
    batch_size: int = 1024
    weight_decay: float = 1e-4
    epochs: int = 400
    sgd_momentum: float | None = 0.9
    schedule: str = "cosine"
    image_size: int = 32
    crop: int | None = 4
    flip: bool = True

    def trainer_config(self) -> TrainerConfig:
        """What :class:`manpp_kernels.trainer.LocalTrainer` takes; model, data and schedule are the caller's.

        The trainer makes SGD alone by itself: where the recipe has AdamW, the config has no learning rate, and the
        trainer asks for an ``optimizer``, which is :meth:`optimizer`.
        """
        config = TrainerConfig(rule=self.rule, rule_options=dict(self.rule_options), blocks=self.blocks)
        if self.sgd_momentum is None:
            return dataclasses.replace(config, learning_rate=None)
        return dataclasses.replace(
            config,
            learning_rate=self.learning_rate,
            sgd_momentum=self.sgd_momentum,
            weight_decay=self.weight_decay,
        )

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Makes the published optimizer: what a trainer takes as its ``optimizer``."""
        if self.sgd_momentum is None:
            return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
        return self.trainer_config().sgd(parameters)

    def settings(self) -> dict[str, Any]:
        """The options of ``manpp train``, by their names; without ``data`` where the user has to give it."""
        given = {
            "data": self.data,
            "image_size": self.image_size,
            "crop": self.crop,
            "flip": self.flip,
            "model": self.model,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            **self._optimizer(),
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "schedule": self.schedule,
            "rule": self.rule,
            "blocks": self.blocks,
            **self.rule_options,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _optimizer(self) -> dict[str, Any]:
        if self.sgd_momentum is None:
            return {"optimizer": "adamw"}
        return {"optimizer": "sgd", "optimizer_arg": {"momentum": self.sgd_momentum, "nesterov": True}}


# Each rule's name in a recipe: the rule, and its options where they are not its defaults.
_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "dgl": ("dgl", {}),
    "predsim": ("predsim", {}),
    "infopro": ("infopro", {}),
    "infopro-contrastive": ("infopro", {"loss": "contrastive"}),
    "auglocal": ("auglocal", {}),
    "man": ("man", {}),
    "man-infopro": ("man", {"host": "infopro"}),
    "man++": ("man++", {}),
    "man++-infopro": ("man++", {"host": "infopro"}),
    "mlaan": ("mlaan", {}),
}
_SMALL_NETWORKS = {"resnet32": (8, 16), "resnet110": (32, 55)}
_DEEP: dict[tuple[str, str], dict[str, Any]] = {("auglocal", "resnet110"): {"auxiliary_depth": 3}}
_SMALL_IMAGES: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "svhn": {"crop": 2, "flip": False},
    "stl10": {"image_size": 96, "learning_rate": 0.1, "batch_size": 128},
}

_RESNET101_K4 = ("layer2.2", "layer3.8", "layer3.16")
_IMAGENET_NETWORKS: dict[str, dict[int, tuple[str, ...]]] = {
    "resnet101": {2: ("layer2.0",), 4: _RESNET101_K4},
    "resnet152": {2: ("layer2.5",), 4: ("layer2.6", "layer3.13", "layer3.25")},
    "resnext101_32x8d": {4: _RESNET101_K4},
}
_IMAGENET: dict[str, Any] = {
    "data": None,
    "learning_rate": 0.4,
    "epochs": 90,
    "image_size": 224,
    "crop": None,
}
_IMAGENET_INFOPRO = {"decoder_weight": 5.0, "classifier_weight": 0.75}
_VISION_TRANSFORMERS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
_ADAMW: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 1e-2, "sgd_momentum": None}


def _small() -> Iterator[Recipe]:
    for data, changes in _SMALL_IMAGES.items():
        for model, counts in _SMALL_NETWORKS.items():
            yield Recipe(f"e2e/{data}/{model}", "e2e", model, 1, data, **changes)
            for variant, (rule, options) in _RULES.items():
                options = {**options, **_DEEP.get((variant, model), {})}
                for k in counts:
                    yield Recipe(f"{variant}/{data}/{model}-k{k}", rule, model, k, data, options, **changes)


def _imagenet() -> Iterator[Recipe]:
    for model, divisions in _IMAGENET_NETWORKS.items():
        yield Recipe(f"e2e/imagenet/{model}", "e2e", model, 1, **_IMAGENET)
        for k, boundaries in divisions.items():
            for variant, rule, options in (
                ("infopro", "infopro", _IMAGENET_INFOPRO),
                ("man++-infopro", "man++", {"host": "infopro", "host_options": _IMAGENET_INFOPRO}),
            ):
                yield Recipe(
                    f"{variant}/imagenet/{model}-k{k}", rule, model, boundaries, rule_options=options, **_IMAGENET
                )


def _transformers() -> Iterator[Recipe]:
    for model in _VISION_TRANSFORMERS:
        shared = {**_IMAGENET, **_ADAMW}
        yield Recipe(f"e2e/imagenet/{model}", "e2e", f"timm/{model}", 1, **shared)
        # K = 4 makes blocks of three transformer blocks each, the first of them with the embedding.
        yield Recipe(
            f"man++/imagenet/{model}-k4", "man++", f"timm/{model}", 4, rule_options={"auxiliary_depth": 2}, **shared
        )


RECIPES: dict[str, Recipe] = {r.name: r for r in (*_small(), *_imagenet(), *_transformers())}


def recipe(name: str) -> Recipe:
    """The recipe ``name``.

    Raises:
        ValueError: there is none of this name; the message has the nearest ones.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"names are like {next(iter(RECIPES))}"
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    return RECIPES[name]
