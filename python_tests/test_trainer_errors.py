"""``LocalTrainer``: what it refuses, and what it says then."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from test_trainer import batch, loader, small_model, small_trainer
from torch import nn
from torch.nn.utils import parametrize, prune

from manpp_kernels.local import Parts, adapt
from manpp_kernels.trainer import LocalTrainer, TrainerConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rule": "dlg"}, "no rule 'dlg'"),
        ({"order": "locked"}, "order has to be one of published, unlocked"),
        ({"amp": "fp8"}, "amp has to be one of"),
        ({"schedule": "batch"}, "schedule has to be one of"),
        ({"balance": "time"}, "balance has to be one of"),
        ({"balance": "memory", "blocks": ["layer1.0"]}, "blocks gives the boundaries itself"),
        ({"accumulate": 0}, "accumulate has to be 1 or more"),
        ({"clip_norm": 0.0}, "clip_norm has to be positive"),
        ({"label_smoothing": 2.0}, r"label_smoothing has to lie in \[0, 1\], and is 2\.0"),
        ({"label_smoothing": -0.1}, "label_smoothing has to lie in"),
        ({"blocks": 9}, "blocks is 9, and CifarResNet can be divided into 1 to 4"),
        ({"rule": "e2e", "blocks": 2}, "end-to-end training has 1 block"),
        ({"learning_rate": math.nan}, "learning_rate has to be 0 or more, and is nan"),
        ({"sgd_momentum": math.nan}, "sgd_momentum has to be 0 or more, and is nan"),
        ({"weight_decay": math.inf}, "weight_decay has to be finite, and is inf"),
        ({"compile": "nosuch"}, "torch.compile has no backend 'nosuch'; there are .*inductor"),
        ({"recompute": True, "compile": "eager"}, "recomputed .* can be compiled by inductor .*, not by 'eager'"),
        ({"recompute": True, "compile": "inductor", "rule": "mlaan"}, "do not overlap, and those of rule='mlaan' do"),
    ],
)
def test_wrong_configurations(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_trainer(**config)


def test_wrong_class_counts_and_batches() -> None:
    with pytest.raises(ValueError, match="num_classes is 7, and the model's output has 4"):
        LocalTrainer(small_model(), example=(3, 8, 8), num_classes=7)
    trainer = small_trainer()
    before = copy.deepcopy(trainer.network.state_dict())
    images, targets = batch()
    for wrong, message in (
        ((images, targets + 1), "labels lie between 1 and 4, and the model has 4 classes"),
        ((images, targets - 1), "labels lie between -1 and 2"),
        ((images, targets[:3]), "8 images and 3 targets"),
        ((images[:1], targets[:1]), "leaves 1 images for one"),
        (((images * 9).to(torch.uint8), targets), "images have to be of a floating dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.step(wrong)
        if len(wrong[0]) > 1:
            with pytest.raises(ValueError, match=message):
                trainer.evaluate([(images, targets), wrong])
    after = trainer.network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    for empty in (trainer.evaluate, functools.partial(trainer.fit, epochs=1)):
        with pytest.raises(ValueError, match="the loader gave no batch"):
            empty([])
    with pytest.raises(ValueError, match="resume=True continues from checkpoint_dir"):
        trainer.fit(loader(), 1, resume=True)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: LocalTrainer(nn.Sequential(nn.ReLU()), example=(3, 8, 8)), ValueError, "Sequential has no parameters"),
        (
            lambda: LocalTrainer(small_model(), {"rule": "dgl"}, example=(3, 8, 8)),  # type: ignore[arg-type]
            TypeError,
            "config has to be a TrainerConfig, and is dict",
        ),
        (lambda: TrainerConfig(accumulate="2"), TypeError, "accumulate has to be a whole number, and is '2'"),  # type: ignore[arg-type]
        (lambda: TrainerConfig(clip_norm="1"), TypeError, "clip_norm has to be a number, and is '1'"),  # type: ignore[arg-type]
        (lambda: TrainerConfig(label_smoothing=True), TypeError, "label_smoothing has to be a number, and is True"),
        (lambda: TrainerConfig(learning_rate="0.1"), TypeError, "learning_rate has to be a number, and is '0.1'"),  # type: ignore[arg-type]
        (lambda: TrainerConfig(compile=True), TypeError, "a torch.compile backend, such as 'inductor', .* is True"),  # type: ignore[arg-type]
        (lambda: TrainerConfig(recompute="no"), TypeError, "recompute has to be True or False, and is 'no'"),  # type: ignore[arg-type]
        (lambda: TrainerConfig(channels_last=1), TypeError, "channels_last has to be True or False, and is 1"),  # type: ignore[arg-type]
        (lambda: small_trainer().fit(loader(), "3"), TypeError, "epochs has to be a whole number, and is '3'"),  # type: ignore[arg-type]
        (
            lambda: small_trainer().fit(loader(), 1, checkpoint_dir="x", checkpoint_every=2.5),  # type: ignore[arg-type]
            TypeError,
            r"checkpoint_every has to be a whole number, and is 2\.5",
        ),
        (lambda: small_trainer().fit(loader(), -1), ValueError, "epochs has to be 0 or more, and is -1"),
        (
            lambda: small_trainer(rule="man++", rule_options={"momentum": "0.9"}),
            TypeError,
            "momentum has to be a number, and is '0.9'",
        ),
        (
            lambda: LocalTrainer(small_model(), example=(3, 8, 8), optimizer=torch.optim.LBFGS),
            TypeError,
            "LBFGS needs closure, and the trainer calls it without arguments",
        ),
        (lambda: small_trainer().step({"image": batch()[0]}), TypeError, "two tensors, and is dict"),  # type: ignore[arg-type]
        (lambda: small_trainer().step((*batch(), 3)), TypeError, "two tensors, and is Tensor, Tensor, int"),  # type: ignore[arg-type]
        (lambda: small_trainer().evaluate([{"image": batch()[0]}]), TypeError, "two tensors, and is dict"),  # type: ignore[list-item]
        (lambda: small_trainer().evaluate([(*batch(), 3)]), TypeError, "two tensors, and is Tensor, Tensor, int"),  # type: ignore[list-item]
    ],
)
def test_arguments_of_another_kind(make: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_checkpoints_every_few_steps_need_a_place() -> None:
    with pytest.raises(ValueError, match="give checkpoint_dir too"):
        small_trainer().fit(loader(), 1, checkpoint_every=5)


@pytest.mark.parametrize("rule", ["dgl", "predsim", "mlaan"])
def test_one_image_is_enough_where_nothing_needs_two(rule: str) -> None:
    """No batch normalisation beside the network."""
    layers = [layer for size in (5, 6, 6, 6) for layer in (nn.Linear(size, 6), nn.GELU())]
    for accumulate in (1, 2):
        config = TrainerConfig(
            rule=rule, rule_options={"width": "linear"} if rule == "dgl" else None, accumulate=accumulate
        )
        trainer = LocalTrainer(nn.Sequential(*copy.deepcopy(layers), nn.Linear(6, 4)), config, example=(5,))
        result = trainer.step((torch.rand(accumulate, 5), torch.arange(accumulate)))
        assert all(torch.isfinite(loss) for loss in result.losses)
    with pytest.raises(ValueError, match="a batch of 1 in 2 micro-batches leaves 0 images for one, and each needs 1"):
        trainer.step((torch.rand(1, 5), torch.tensor([0])))


def test_features_that_no_head_fits() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1), nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"the DGL head takes vectors .* features here are \(N, 2, 2, 2, 2\)"):
        LocalTrainer(model, TrainerConfig(rule="dgl"), example=torch.randn(2, 1, 2, 2, 2))


def test_a_last_block_with_nothing_to_train() -> None:
    model = small_model()
    for p in [*model.layer3.parameters(), *model.fc.parameters()]:
        p.requires_grad_(False)
    for order in ("published", "unlocked"):
        config = TrainerConfig(rule="dgl", blocks=4, order=order)
        with pytest.raises(ValueError, match="nothing in the last block requires grad"):
            LocalTrainer(model, config, example=(3, 8, 8))


def test_one_dimensional_convolutions() -> None:
    layers = [nn.Conv1d(3, 10, 3), nn.Conv1d(10, 10, 3), nn.Flatten(), nn.Linear(460, 4)]
    with pytest.raises(ValueError, match=r"stem ends in features \(N, C, length\)"):
        LocalTrainer(nn.Sequential(*layers), TrainerConfig(rule="dgl", blocks=2), example=torch.rand(2, 3, 50))


def test_optimizers_of_other_parameters() -> None:
    model = small_model()
    for make, error, message in (
        (
            lambda _: torch.optim.SGD(model.parameters(), 0.1),
            ValueError,
            "SGD holds .* of the .* parameters it was given",
        ),
        (lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(1))], 0.1), ValueError, "and 1 others"),
        (lambda _: None, TypeError, "optimizer has to make a torch.optim.Optimizer, and made NoneType"),
    ):
        with pytest.raises(error, match=message):
            LocalTrainer(model, TrainerConfig(rule="dgl"), example=(3, 8, 8), optimizer=make)


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (nn.CrossEntropyLoss, TypeError, "criterion has to be a function or module .* and is CrossEntropyLoss"),
        ("ce", TypeError, "criterion has to be a function or module .* and is 'ce'"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "reduction='none'.*reduction='mean'"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, "reduction='sum'.*reduction='mean'"),
    ],
    ids=["class", "text", "none", "sum"],
)
def test_criteria_that_are_none(criterion: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LocalTrainer(small_model(), TrainerConfig(rule="dgl"), example=(3, 8, 8), criterion=criterion)


def test_labels_are_smoothed_by_a_criterion_itself() -> None:
    config = TrainerConfig(rule="dgl", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1, and is of .* without a criterion"):
        LocalTrainer(small_model(), config, example=(3, 8, 8), criterion=nn.CrossEntropyLoss())


@pytest.mark.parametrize("returned", ["each", "number"])
@pytest.mark.parametrize("rule", ["dgl", "man++", "mlaan", "e2e"])
def test_a_criterion_that_returns_no_scalar(rule: str, returned: str) -> None:
    def criterion(logits: torch.Tensor, targets: torch.Tensor):
        loss = nn.functional.cross_entropy(logits, targets, reduction="none")
        return loss if returned == "each" else loss.mean().item()

    trainer = LocalTrainer(small_model(), TrainerConfig(rule=rule), example=(3, 8, 8), criterion=criterion)
    message = r"criterion has to return a scalar tensor, .*, and returned "
    message += r"a tensor of the shape \(8,\)" if returned == "each" else "float"
    for use in (trainer.step, lambda images: trainer.evaluate([images])):
        with pytest.raises(ValueError, match=message):
            use(batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": torch.optim.AdamW([nn.Parameter(torch.ones(1))])},
            "optimizer has to be a function that makes .*, and is of the class AdamW",
        ),
        ({"optimizer": "sgd"}, "optimizer has to be a function .*, and is of the class str"),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), 1)},
            "scheduler has to be a function that makes .*, and is of the class StepLR",
        ),
        ({"scheduler": lambda o: None}, "scheduler has to make an object with the methods step, .*, and made NoneType"),
        (
            {"scheduler": lambda o: [torch.optim.lr_scheduler.StepLR(o, 1)]},
            "scheduler has to make an object .* and made list; return one of torch.optim.lr_scheduler",
        ),
    ],
)
def test_optimizers_and_schedulers_that_are_no_factories(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LocalTrainer(small_model(), TrainerConfig(rule="dgl"), example=(3, 8, 8), **options)


def _assigned(model: nn.Module) -> None:
    model.load_state_dict(small_model().state_dict(), assign=True)


def _with_another_head(model: nn.Module) -> None:
    model.fc = nn.Linear(model.fc.in_features, 4)


@pytest.mark.parametrize("change", [_assigned, _with_another_head])
def test_a_model_with_other_parameters_than_the_trainer_has(change: Callable[[nn.Module], None]) -> None:
    """The optimizer, or the blocks, would go on with the old ones, and the model stay as it is."""
    trainer = small_trainer(rule="dgl")
    change(trainer.model)
    with pytest.raises(ValueError, match="has other parameters than when the trainer was made"):
        trainer.step(batch())
    trained = small_trainer(rule="dgl")
    trained.step(batch())
    change(trained.model)
    with pytest.raises(ValueError, match="and those would not be trained; make the trainer afterwards"):
        trained.fit(loader(), 1)


def test_parameters_may_take_other_names() -> None:
    """Pruning and parametrisations put a parameter behind those of its module, and it is trained as before."""
    trainer = small_trainer(rule="dgl")
    prune.random_unstructured(trainer.model.fc, "weight", 0.5)
    parametrize.register_parametrization(trainer.model.layer3[0].conv1, "weight", nn.Identity())
    for owner in (trainer.model.fc, trainer.model.layer3[0].conv1):
        before = [p.detach().clone() for p in owner.parameters()]
        trainer.fit(loader(), trainer.epoch + 1)
        assert not any(torch.equal(p, b) for p, b in zip(owner.parameters(), before, strict=True))


def test_what_trains_is_not_replaced_in_the_trainer() -> None:
    """The step would go on with what it was made of."""
    trainer = small_trainer(rule="dgl")
    with pytest.raises(AttributeError, match="config"):
        trainer.config = dataclasses.replace(trainer.config, clip_norm=1.0)  # type: ignore[misc]
    with pytest.raises(AttributeError, match="optimizers"):
        trainer.optimizers = []  # type: ignore[misc]


def test_a_scheduler_of_another_optimizer() -> None:
    """It would move rates that nothing is trained with."""
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    for order in ("published", "unlocked"):
        with pytest.raises(ValueError, match="StepLR was made for another optimizer, and the rates of this one"):
            small_trainer(order=order, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(other, 1))
        several = small_trainer(
            order=order,
            scheduler=lambda o: torch.optim.lr_scheduler.ChainedScheduler(
                [torch.optim.lr_scheduler.StepLR(o, 1), torch.optim.lr_scheduler.StepLR(o, 2)]
            ),
        )
        assert several.schedulers


def test_a_number_of_blocks_that_is_no_integer() -> None:
    with pytest.raises(TypeError, match=r"blocks has to be a number or a sequence of boundaries, and is 2\.0"):
        small_trainer(blocks=2.0)


def test_a_checkpoint_of_another_training_is_not_written_over(tmp_path) -> None:
    first = small_trainer()
    first.fit(loader(), 1, checkpoint_dir=tmp_path)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"checkpoint of another training: continue it with resume=True"):
        small_trainer().fit(loader(), 1, checkpoint_dir=tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    first.fit(loader(), 2, checkpoint_dir=tmp_path)  # its own
    loaded = small_trainer()
    loaded.load(tmp_path)
    assert len(loaded.fit(loader(), 3, checkpoint_dir=tmp_path)) == 3
    with pytest.raises(ValueError, match="checkpoint_every has to be 1 or more, and is 0"):
        first.fit(loader(), 4, checkpoint_dir=tmp_path, checkpoint_every=0)


def test_an_iterator_is_used_up_after_an_epoch() -> None:
    with pytest.raises(ValueError, match="no batch in epoch 2; an iterator is used up"):
        small_trainer().fit(iter([batch()]), 2)


def test_adapters_that_say_something_else() -> None:
    class Mine(nn.Sequential):
        says: object = None

    @adapt.register(Mine)
    def _(model: Mine) -> object:
        return model.says() if callable(model.says) else model.says

    model = Mine(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    stem, unit, head = model
    for says, message in (
        ((stem, [unit], head), r"the adapter of Mine has to return manpp_kernels\.local\.Parts, and returned tuple"),
        (lambda: Parts(stem, [unit], head), "units has to be a mapping of names to modules, and is list"),  # type: ignore[arg-type]
        (lambda: Parts(stem, {"1": unit}, head.forward), "head has to be a module, and is method"),  # type: ignore[arg-type]
        (lambda: Parts(stem, {"1": "unit"}, head), "unit 1 has to be a module, and is str"),  # type: ignore[dict-item]
    ):
        model.says = says
        with pytest.raises(TypeError, match=message):
            LocalTrainer(model, TrainerConfig(rule="dgl"), example=(4,))


def test_models_inside_others_and_tokens() -> None:
    for wrapped in (torch.compile(small_model(), backend="eager"), nn.DataParallel(small_model())):
        with pytest.raises(TypeError, match=r"is wrapped, as .*; pass the CifarResNet inside"):
            LocalTrainer(wrapped, example=(3, 8, 8))
    network = nn.Module()
    network.module, network.head = nn.Linear(4, 4), nn.Linear(4, 2)
    with pytest.raises(TypeError, match="there is no adapter for Module; register a function"):
        LocalTrainer(network, example=(4,))
    with pytest.raises(ValueError, match=r"example images are torch\.int64, .* of a floating dtype"):
        LocalTrainer(small_model(), example=torch.zeros(2, 3, 8, 8, dtype=torch.int64))
