"""RetinaNet in local blocks."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, mobilenet_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from manpp_kernels.local import detection, partition
from manpp_kernels.local.detection import RetinaNetLoss, RetinaNetOutputs, detection_batch, stage_ends
from manpp_kernels.local.targets import BatchError
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

SIDE, CLASSES, CHANNELS = 64, 3, 16
NARROW = {"host_options": {"width": "narrow"}}


def detector() -> RetinaNet:
    """A small one, whose anchors fit small images."""
    torch.manual_seed(0)
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(body, layers, [128, 256, 512], CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))
    sizes = tuple((side, int(1.3 * side)) for side in (8, 16, 32, 48, 64))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return RetinaNet(backbone, CLASSES, min_size=SIDE, max_size=SIDE, anchor_generator=generator)


def scenes(count: int = 3) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Real digits, two of each image, large and small ones as two classes; the last image has none."""
    data = torch.from_numpy(load_digits().images / 16).float()
    images, targets = [], []
    for i in range(count):
        image, boxes = torch.zeros(3, SIDE, SIDE), []
        for j, (side, top, left) in enumerate([(32, 4 + 2 * i, 4), (16, 40, 40 - 3 * i)] if i < count - 1 else []):
            digit = F.interpolate(data[None, None, 2 * i + j], side, mode="bilinear")[0]
            image[:, top : top + side, left : left + side] = digit
            boxes.append([left, top, left + side, top + side])
        images.append(image)
        labels = torch.tensor([1, 2][: len(boxes)], dtype=torch.int64)
        targets.append({"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels})
    return images, targets


def make(found: RetinaNet, **settings: Any) -> LocalTrainer:
    config = TrainerConfig(**{"blocks": stage_ends(found), "learning_rate": 0.01, **settings})
    return LocalTrainer(RetinaNetOutputs(found), config, example=(3, SIDE, SIDE), criterion=RetinaNetLoss(found))


def test_end_to_end_is_torchvisions_own_training() -> None:
    model = detector()
    twin = copy.deepcopy(model).train()
    images, targets = scenes()
    images[1] = F.pad(images[1], (0, 0, 0, -16))  # of another size: it is resized, normalised and padded
    trainer = make(model, rule="e2e", blocks=1)
    result = trainer.step(detection_batch(model, images, targets))
    loss = sum(twin(images, [dict(t) for t in targets]).values())
    loss.backward()
    trainer.config.sgd(list(twin.parameters())).step()
    torch.testing.assert_close(result.losses[0], loss.detach())
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    exported = trainer.export_state_dict()
    assert {key.removeprefix("detector.") for key in exported} == set(twin.state_dict())


def test_the_loss_of_the_pyramid_stays_in_the_last_block() -> None:
    """A step of DGL, by hand."""
    model = detector()
    trainer = make(model, rule="dgl")
    assert trainer.network.partition.names()[1:] == [["layer2.0"], ["layer3.0"], ["layer4.0"]]
    twin = copy.deepcopy(trainer.network)
    batch = images, targets = detection_batch(model, *scenes())
    result = trainer.step(batch)

    segments = [segment.module for segment in twin.partition.segments]
    criterion, x, features = RetinaNetLoss(model), images, []
    losses = []
    for j, modules in enumerate([segments[:2], segments[2:3], segments[3:4]]):
        x = nn.Sequential(*modules)(x)
        losses.append(criterion(twin.blocks[j].auxiliary.head(x), targets))
        x = x.detach()
        features.append(x)
    losses.append(criterion(twin.partition.parts.head(segments[4](x), *features[1:]), targets))
    for loss in losses:
        loss.backward()
    trainer.config.sgd([p for p in twin.parameters() if p.grad is not None]).step()
    torch.testing.assert_close(result.losses, [loss.detach() for loss in losses])
    for a, b in zip(trainer.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", ["narrow", "wide", "linear"])
def test_every_block_looks_at_the_level_of_its_stride(width: str) -> None:
    """Behind the next unit, as MAN++ has it: P3, P4, and P5 to P7."""
    trainer = make(detector(), rule="man++", rule_options={"host_options": {"width": width}})
    images, _ = detection_batch(trainer.model.detector, *scenes())
    of_model = trainer.model(images)[..., -4:]
    ends = [64 * 6, 64 * 6 + 16 * 6, of_model.shape[1]]
    x = images
    for block, start, end in zip(trainer.network, [0, *ends], ends, strict=False):
        x = block.body(x)
        features = x[0] if isinstance(x, tuple) else x
        outputs = block.auxiliary.host.head(block.auxiliary.transform(features))
        assert outputs.shape == (3, end - start, CLASSES + 8)
        assert torch.equal(outputs[..., -4:], of_model[:, start:end])
        # Everything is background at first.
        assert outputs[..., :CLASSES].sigmoid().max() < 0.2


def test_training_learns() -> None:
    model = detector()
    trainer = LocalTrainer(
        RetinaNetOutputs(model),
        TrainerConfig(rule="man++", rule_options=NARROW, blocks=stage_ends(model), clip_norm=1.0),
        example=(3, SIDE, SIDE),
        criterion=RetinaNetLoss(model),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
    )
    images, targets = scenes()
    batch = detection_batch(model, images, targets)
    losses = [torch.stack(trainer.step(batch).losses) for _ in range(20)]
    assert (losses[-1] < 0.5 * losses[0]).all(), "every block has learned"
    row = trainer.fit([batch], 1, val_loader=[batch])[-1]
    assert (row["train_acc"], row["val_acc"]) == (None, None)
    assert row["val_loss"] > 0


def test_copies_and_pickles() -> None:
    """A copy of the network is one of the detector too; anchors stay those that the user gave it."""
    model = detector()
    model.anchor_generator.cell_anchors[0] += 1.0  # of its own making
    network = make(model, rule="dgl").network
    images, targets = detection_batch(model, *scenes())
    expected = RetinaNetOutputs(model)(images)[:, : 64 * 6, -4:]
    for twin in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        block = twin.blocks[0]
        features, *_ = block.body(images)
        assert torch.equal(block.auxiliary.head(features)[..., -4:], expected)
        assert block(images, images, targets).loss > 0


@pytest.mark.parametrize(
    "layers", [("layer2", "layer3"), ("layer4",), ("layer1", "layer2", "layer3", "layer4")], ids=" ".join
)
def test_other_stages_of_the_backbone(layers: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    channels = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
    body, names = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), {name: str(i) for i, name in enumerate(layers)}
    backbone = BackboneWithFPN(body, names, [channels[n] for n in layers], CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))
    generator = AnchorGenerator(tuple((8 * 2**i,) for i in range(len(layers) + 2)), ((1.0,),) * (len(layers) + 2))
    model = RetinaNet(backbone, CLASSES, min_size=SIDE, max_size=SIDE, anchor_generator=generator)
    trainer = make(model, rule="dgl")
    names_of_blocks = trainer.network.partition.names()
    assert [block[-1] for block in names_of_blocks] == [f"layer{i}.0" for i in range(1, int(layers[-1][-1]) + 1)]
    batch = detection_batch(model, *scenes())
    images, targets = scenes()
    expected = sum(copy.deepcopy(model).train()(images, targets).values())
    torch.testing.assert_close(trainer.step(batch).losses[-1], expected.detach())


def test_precision() -> None:
    """Anchors and boxes are float32 at least, whatever the images are."""
    model = detector().double()
    images, targets = scenes()
    wide = [{**t, "boxes": torch.tensor([[0.0, 0.0, 257.0, 513.0]]), "labels": torch.tensor([1])} for t in targets]
    model.transform.min_size, model.transform.max_size = (600,), 600
    images = [torch.zeros(3, 600, 600) for _ in images]
    for dtype, boxes in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found, rows = detection_batch(model, [image.to(dtype) for image in images], wide)
        assert (found.dtype, rows.dtype) == (dtype, boxes)
        assert rows[0, 0].tolist() == [0.0, 0.0, 257.0, 513.0, 1.0]
    assert make(model, rule="dgl").model(torch.zeros(1, 3, SIDE, SIDE).double()).dtype == torch.float64


def test_targets_that_cannot_be() -> None:
    model = detector()
    images, targets = scenes()
    for change, message in (
        ({"boxes": torch.tensor([[4.0, 4.0, 4.0, 9.0]])}, r"image 0 has the box \[4\.0, 4\.0, 4\.0, 9\.0\] .* no area"),
        ({"labels": torch.tensor([-1])}, r"image 0 has labels between -1 and -1, .* has 3 classes \(0 to 2\)"),
        ({"labels": torch.tensor([3])}, "image 0 has labels between 3 and 3, and the detector has 3 classes"),
        ({"boxes": torch.ones(4)}, r"boxes of the shape \(4,\) and 1 labels; give a box"),
    ):
        target = {"boxes": torch.tensor([[4.0, 4.0, 9.0, 9.0]]), "labels": torch.tensor([1]), **change}
        with pytest.raises(BatchError, match=message):
            detection_batch(model, images, [target, *targets[1:]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = detection_batch(model, images, [nothing] * 3)
    assert batch[1].shape == (3, 0, 5)
    assert all(loss < 0.01 for loss in make(model, rule="dgl").step(batch).losses), "all of it is background"


def test_detectors_that_do_not_come_apart() -> None:
    with pytest.raises(TypeError, match=r"train RetinaNetOutputs\(detector\) with the criterion RetinaNetLoss"):
        LocalTrainer(detector(), TrainerConfig(rule="dgl"), example=(3, SIDE, SIDE))
    backbone = mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True)
    sizes = ((8,), (16,), (32,))
    mobile = RetinaNet(backbone, CLASSES, anchor_generator=AnchorGenerator(sizes, ((1.0,),) * 3))
    for use in (stage_ends, RetinaNetOutputs):
        with pytest.raises(TypeError, match=r"a ResNet alone .* backbone is BackboneWithFPN of another network"):
            use(mobile)
    with pytest.raises(TypeError, match="has to be a RetinaNet of torchvision, and is FCOS"):
        RetinaNetOutputs(FCOS(backbone, CLASSES))


def test_sides_that_the_backbone_does_not_divide() -> None:
    """Torchvision's anchors drift from their cells there, and those of each block elsewhere."""
    model = detector()
    trainer = make(model, rule="dgl")
    targets = torch.tensor([[[4.0, 4.0, 30.0, 30.0, 1.0]]] * 2)
    with pytest.raises(BatchError, match="become maps of 13 x 13, 7 x 7, 4 x 4; give images whose sides are multiples"):
        trainer.step((torch.rand(2, 3, 100, 100), targets))
    with pytest.raises(BatchError, match="become maps of 8 x 8, 4 x 4, 2 x 2; give images whose sides are multiples"):
        trainer.evaluate([(torch.rand(2, 3, 60, 60), targets)])
    with pytest.raises(BatchError, match="images of about 100 x 100 pixels become maps"):
        partition(RetinaNetOutputs(model), 4, example=(3, 100, 100))
    for height, width in ((64, 96), (96, 32)):  # other sizes than the example's are no matter
        assert trainer.step((torch.rand(2, 3, height, width), targets)).logits.shape[0] == 2


def test_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "is_capturing", lambda device: True)
    model = detector()
    with pytest.raises(RuntimeError, match=r"the losses of a RetinaNet .* set cuda_graphs=False"):
        make(model, rule="dgl").step(detection_batch(model, *scenes()))


def test_errors() -> None:
    model = detector()
    trainer = make(model, rule="dgl")
    images, _ = detection_batch(model, *scenes())
    with pytest.raises(BatchError, match=r"have to be \(N, boxes, 5\), as detection_batch makes them, and are \(3,\)"):
        trainer.step((images, torch.zeros(3)))
    with pytest.raises(ValueError, match="RetinaNetOutputs gives no logits of classes; give the trainer a criterion"):
        LocalTrainer(RetinaNetOutputs(model), TrainerConfig(rule="dgl"), example=(3, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"rule 'predsim'.* classify images, and what RetinaNetOutputs gives is"):
        make(detector(), rule="predsim")
    model.backbone = nn.Identity()
    with pytest.raises(TypeError, match=r"of a ResNet alone .* and the backbone is Identity"):
        partition(RetinaNetOutputs(model), 4, example=(3, SIDE, SIDE))
