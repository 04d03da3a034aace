"""What a run is: the options of the data, of the run and of the trainer, and where their values come from."""

# ruff: noqa: RUF009 (option() makes a dataclass field, as dataclasses.field() does)
from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manpp_kernels.cli.parsing import (
    Option,
    Parser,
    UserError,
    add_option,
    key,
    option,
    options_of,
    parse_config,
    read_config,
)
from manpp_kernels.cli.recipe import default_weight_decay
from manpp_kernels.local.rules import make_rule
from manpp_kernels.local.rules import names as rule_names
from manpp_kernels.trainer import TrainerConfig


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are shown to the network."""

    data: str = option("digits", "digits, fashion-mnist, cifar10, cifar100, svhn, stl10 or folder:PATH", metavar="SET")
    data_root: Path = option(Path("data"), "folder of the files of the set")
    download: bool = option(False, "let torchvision fetch the files that are not there")
    image_size: int | None = option(None, "width and height of the images; by default the set's usual one", minimum=1)
    limit: int | None = option(None, "train on the first N images only", minimum=1)
    test_limit: int | None = option(None, "test on the first N images only", minimum=1)
    crop: int | None = option(None, "pixels to shift images by at random; by default the set's recipe", minimum=0)
    flip: bool | None = option(None, "mirror images at random; by default the set's recipe")
    workers: int = option(2, "processes that decode images, where a folder is too large for the memory", minimum=0)


@dataclass(frozen=True)
class RunConfig:
    """The network, the optimizer, and where the run happens."""

    model: str = option(
        "resnet32", "resnet20, 32, 44, 56, 110 for small images, one of torchvision's, or timm/NAME", metavar="NAME"
    )
    epochs: int = option(10, "passes over the training images", minimum=1)
    batch_size: int = option(128, "images a step, of all processes together", minimum=2)
    optimizer: str = option("sgd", "any optimizer of torch.optim; sgd comes with Nesterov momentum", metavar="NAME")
    lr: float | None = option(None, "learning rate; by default 0.1 per 128 images for sgd, 0.001 for adamw", minimum=0)
    weight_decay: float | None = option(
        None, f"weight decay; by default {TrainerConfig.weight_decay:g}, where the optimizer has one", minimum=0
    )
    optimizer_arg: dict[str, Any] = option({}, "another argument of the optimizer, as momentum=0.8; repeatable")
    schedule: Literal["cosine", "linear", "step", "constant"] = option("cosine", "of the learning rate")
    warmup: int = option(0, "epochs in which the learning rate rises first", minimum=0)
    seed: int = option(0, "of the weights, the order of the images and their augmentation", minimum=0)
    threads: int | None = option(None, "threads of PyTorch on the CPU; by default its own choice", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto is cuda where there is one")
    out: Path | None = option(None, "folder of the run; by default a new one in runs/")
    tensorboard: bool = option(True, "write TensorBoard events")
    observe: bool = option(
        False, "follow every block: accuracy of its local head, s, the EMA beside its source, memory; see manpp report"
    )


# Fields of the trainer's that are no options here: the optimizer has options of its own above, and the options of the
# rules are options in their own right.
_HIDDEN = {"learning_rate", "sgd_momentum", "nesterov", "weight_decay", "rule_options"}
# What the trainer's documentation says in terms of Python, said in terms of the command line.
_TEXTS = {
    "rule": f"{', '.join(rule_names())} [{TrainerConfig.rule}]",
    "blocks": "K, how many local blocks; or the last unit of each but the last, as layer1.4,layer2.4; by default every "
    "unit is a block (e2e: one block)",
    "data_parallel": "train in all processes that torchrun has started, each on its share of every batch: "
    "torchrun --nproc-per-node 2 -m manpp_kernels.cli train --data-parallel …",
    "pipeline": "train in all processes that torchrun has started, each some of the local blocks, one batch behind the "
    "other: torchrun --nproc-per-node 2 -m manpp_kernels.cli train --pipeline …",
}
# Above, the schedule is its shape; the trainer's field of this name says how often it moves.
_RENAMED = {"schedule": "schedule_every"}


def _trainer_options() -> list[Option]:
    found = [spec for spec in options_of(TrainerConfig) if spec.name not in _HIDDEN]
    return [
        dataclasses.replace(spec, name=_RENAMED.get(spec.name, spec.name), text=_TEXTS.get(spec.name, spec.text))
        for spec in found
    ]


def _rule_options() -> list[Option]:
    """The options of all rules; one that several have is one option, with what it means to each of them."""
    merged: dict[str, Option] = {}
    owners: dict[str, dict[str, list[str]]] = {}  # of each option, by its texts
    for rule in rule_names():
        for spec in options_of(make_rule(rule).Options):
            known = merged.setdefault(spec.name, spec)
            kinds = known.kinds + [kind for kind in spec.kinds if kind not in known.kinds]
            merged[spec.name] = dataclasses.replace(known, kinds=kinds)
            owners.setdefault(spec.name, {}).setdefault(spec.text, []).append(rule)
    return [
        dataclasses.replace(spec, text="; ".join(f"{', '.join(r)}: {text}" for text, r in owners[name].items()))
        for name, spec in merged.items()
    ]


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`Settings`, from the fields of the dataclasses that hold their defaults."""
    for title, specs in (
        ("images", options_of(DataConfig)),
        ("network, optimizer and run", options_of(RunConfig)),
        ("local learning and trainer", _trainer_options()),
        ("rules", _rule_options()),
    ):
        group = parser.add_argument_group(title)
        for spec in specs:
            add_option(group, spec)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes, and where its files go."""

    data: DataConfig
    run: RunConfig
    trainer: TrainerConfig

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from the options that were given, by their names; defaults for the others."""

        def fields(config: type) -> dict[str, Any]:
            return {f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given}

        trainer = {
            field.name: given[name]
            for field in dataclasses.fields(TrainerConfig)
            if (name := _RENAMED.get(field.name, field.name)) in given and field.name not in _HIDDEN
        }
        rule = {spec.name: given[spec.name] for spec in _rule_options() if spec.name in given}
        try:
            run = RunConfig(**fields(RunConfig))
            if run.seed >= 2**40:
                raise ValueError(f"seed has to be below 2^40, and is {run.seed}")
            if run.weight_decay is None:
                run = dataclasses.replace(run, weight_decay=default_weight_decay(run.optimizer))
            settings = cls(
                DataConfig(**fields(DataConfig)),
                run,
                TrainerConfig(**trainer, rule_options=rule or None),
            )
            chosen = make_rule(settings.trainer.rule, settings.trainer.rule_options)
            chosen.check_order(settings.trainer.order)
            chosen.check_apart(settings.trainer.streams, settings.trainer.shares_out)
            if run.observe and settings.trainer.cuda_graphs:
                raise ValueError("observe looks into every step, which cuda_graphs leaves to the device alone; use one")
            for several in ("data_parallel", "pipeline"):
                if run.observe and getattr(settings.trainer, several):
                    raise ValueError(f"observe looks into one process, and {several} trains in several; use one")
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        return settings

    def values(self) -> dict[str, Any]:
        """All options by their names; those of the rule only where they were given."""
        trainer = {
            _RENAMED.get(name, name): value for name, value in _shallow(self.trainer).items() if name not in _HIDDEN
        }
        return {**_shallow(self.data), **_shallow(self.run), **trainer, **(self.trainer.rule_options or {})}

    def replace(self, **changes: Any) -> Settings:
        return Settings.of({**self.values(), **changes})

    def save(self, path: Path) -> None:
        """Write a file that ``--config`` takes."""
        import yaml

        path.write_text(yaml.safe_dump(self.content(), sort_keys=False), encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """The keys and values of that file: all but the folder, so that the same run again has one of its own."""
        values = {name: value for name, value in self.values().items() if name != "out"}
        return {key(name): _plain(value) for name, value in values.items() if value not in (None, {})}


def _shallow(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: str(item) for name, item in value.items()}
    return value


def from_file(path: Path) -> dict[str, Any]:
    """The options that a configuration file gives, by their names."""
    return from_content(read_config(path), path)


def from_content(content: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """The same for keys and values that have been read; ``source`` is what errors say of their origin."""
    parser = Parser(add_help=False)
    add_setting_options(parser)
    return vars(parse_config(content, parser, source))
