"""manpp_kernels.data: reading sets of images, augmenting batches, and an order that can be repeated."""

from __future__ import annotations

import gzip
import itertools
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from manpp_kernels.data import (
    DataError,
    EpochBatches,
    PerImageCrop,
    PerImageFlip,
    evaluation_loader,
    load,
    training_loader,
)
from manpp_kernels.data.datasets import DEBIAN_FASHION_MNIST, FileImages, _by_train, read_idx


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion_folder(tmp_path: Path) -> tuple[Path, np.ndarray]:
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
        if part == "train":
            train = images
    return tmp_path, train


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for index in range(10):
            array = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / label / f"{index}.png")
    return tmp_path


class TestDatasets:
    def test_digits(self) -> None:
        data = load("digits")
        assert data.train.images.shape == (1437, 1, 32, 32)
        assert data.train.images.dtype == torch.uint8
        assert data.train.images.amax() == 255
        std, mean = torch.std_mean(load("digits", size=8).train.images / 255)  # as they come
        assert (data.mean[0], data.std[0]) == pytest.approx((mean.item(), std.item()), abs=1e-3)
        assert len(data.test) == 360
        # Stratified: every class has its share of the test set.
        assert data.test.labels.bincount().min() >= 34

    def test_digits_are_the_same_every_time(self) -> None:
        assert torch.equal(load("digits").train.labels, load("digits").train.labels)

    def test_limits_and_size(self) -> None:
        data = load("digits", size=16, limit=7, test_limit=5)
        assert data.train.images.shape == (7, 1, 16, 16)
        assert len(data.test) == 5
        assert torch.equal(data.train.labels, load("digits").train.labels[:7])

    def test_fashion_mnist_from_gz(self, fashion_folder: tuple[Path, np.ndarray]) -> None:
        root, images = fashion_folder
        data = load("fashion-mnist", root, size=28)
        assert np.array_equal(data.train.images[:, 0].numpy(), images)
        assert data.train.labels.tolist() == [i % 10 for i in range(30)]
        assert len(data.test) == 10

    def test_fashion_mnist_where_torchvision_puts_it(
        self, fashion_folder: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        root, images = fashion_folder
        raw = tmp_path / "other" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in root.glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        data = load("fashion-mnist", tmp_path / "other", size=28)
        assert np.array_equal(data.train.images[:, 0].numpy(), images)

    @pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
    def test_fashion_mnist_from_debian(self, tmp_path: Path) -> None:
        data = load("fashion-mnist", tmp_path, limit=1000, test_limit=100)
        assert data.train.images.shape == (1000, 1, 32, 32)
        assert data.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
        assert 0.2 < data.train.images.float().mean() / 255 < 0.35

    @pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01\0\0\0\x05ab", b"\0\0\x09\x01\0\0\0\x01a", b"PK\3\4" * 9])
    def test_damaged_idx(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(DataError, match="not a complete idx file"):
            read_idx(tmp_path / "damaged")

    def test_damaged_gz(self, tmp_path: Path) -> None:
        (tmp_path / "cut.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde")[:-9])
        with pytest.raises(DataError, match="cannot be read"):
            read_idx(tmp_path / "cut.gz")

    def test_labels_of_another_set(self, fashion_folder: tuple[Path, np.ndarray]) -> None:
        root, _ = fashion_folder
        write_idx(root / "train-labels-idx1-ubyte.gz", np.zeros(4, np.uint8))
        with pytest.raises(DataError, match="do not belong together"):
            load("fashion-mnist", root)

    def test_layouts_of_torchvisions_sets(self, tmp_path: Path) -> None:
        """CIFAR's data is an array (N, H, W, C), SVHN's and STL-10's (N, C, H, W), and some sets are grey."""

        class Fake:
            data: Any
            targets = (3, 1)

            def __init__(self, root: Path, train: bool, download: bool) -> None:
                pass

        images = torch.randint(256, (2, 3, 6, 5), dtype=torch.uint8)
        for array, expected in (
            (images.permute(0, 2, 3, 1).numpy(), images),
            (images.numpy(), images),
            (images[:, 0].numpy(), images[:, :1]),
        ):
            Fake.data = array
            _, test = _by_train(Fake, "fake")(tmp_path, False)
            assert torch.equal(test.images, expected)
            assert test.labels.tolist() == [3, 1]

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10"])
    def test_missing_files(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match=rf"{name} is not in .*--data-root.*--download"):
            load(name, tmp_path)

    def test_unknown_name(self) -> None:
        with pytest.raises(DataError, match=r"no set of images 'imagenet'; there are digits, .* folder:PATH"):
            load("imagenet")


class TestFolder:
    def test_split_of_classes(self, image_folder: Path) -> None:
        data = load(f"folder:{image_folder}", size=16)
        assert data.train.images.shape == (16, 3, 16, 16)
        assert data.test.labels.bincount().tolist() == [2, 2]
        assert data.num_classes == 2

    def test_train_and_val(self, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        root = tmp_path_factory.mktemp("split")
        for part in ("train", "val"):
            (root / part).symlink_to(image_folder, target_is_directory=True)
        data = load(f"folder:{root}", size=16, limit=8)
        assert len(data.train) == 8
        assert len(data.train.labels.unique()) == 2  # not the first files of the first class
        assert len(data.test) == 20

    def test_large_folder_is_read_from_files(self, image_folder: Path) -> None:
        data = load(f"folder:{image_folder}", size=16, memory_limit=1000)
        assert isinstance(data.train, FileImages)
        assert data.train.files == load(f"folder:{image_folder}", size=16, memory_limit=1000).train.files
        # Cropped at random where it is read, and so not once more; the test images always alike.
        assert data.crop == 0
        assert not torch.equal(data.train.batch(torch.arange(4))[0], data.train.batch(torch.arange(4))[0])
        assert torch.equal(data.test.batch(torch.arange(4))[0], load(f"folder:{image_folder}", size=16).test.images)
        batches = [list(training_loader(data, 4, seed=1, workers=workers)) for workers in (0, 2)]
        for (images, labels), (again, same) in zip(*batches, strict=True):
            assert images.shape == (4, 3, 16, 16)
            assert torch.equal(images, again)
            assert torch.equal(labels, same)

    def test_hidden_folders_and_files_are_passed_over(self, image_folder: Path) -> None:
        """With images in it a hidden folder would be a class, and without it would be an error."""
        expected = load(f"folder:{image_folder}", size=16)
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (image_folder / name).mkdir()
        (image_folder / ".cache").symlink_to(image_folder / "cat", target_is_directory=True)
        (image_folder / "cat" / "._1.png").write_text("what macOS leaves beside 1.png on other file systems")
        shutil.copytree(image_folder / "dog", image_folder / "cat" / ".ipynb_checkpoints")
        data = load(f"folder:{image_folder}", size=16)
        assert data.num_classes == 2
        assert torch.equal(data.train.labels, expected.train.labels)
        assert torch.equal(data.test.images, expected.test.images)

    def test_hidden_above_the_folder_is_not_in_it(self, image_folder: Path) -> None:
        for label in ("cat", "dog"):
            shutil.copytree(image_folder / label, image_folder / ".cache" / label)
        assert len(load(f"folder:{image_folder / '.cache'}", size=16).train) == 16

    def test_a_class_of_hidden_images_alone(self, image_folder: Path) -> None:
        (image_folder / "emu").mkdir()
        (image_folder / "emu" / "._1.png").write_text("what macOS leaves beside 1.png on other file systems")
        with pytest.raises(DataError, match="no image that is not hidden for the class emu"):
            load(f"folder:{image_folder}")

    def test_unreadable_image(self, image_folder: Path) -> None:
        (image_folder / "dog" / "3.png").write_text("no image")
        with pytest.raises(DataError, match=r"3\.png cannot be read as an image"):
            load(f"folder:{image_folder}")

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"there is no folder .* as folder:PATH"):
            load(f"folder:{tmp_path / 'nowhere'}")

    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images in one folder a class"):
            load(f"folder:{tmp_path}")


class TestAugmentation:
    @pytest.fixture
    def batch(self) -> Tensor:
        return torch.randint(256, (64, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def test_crop_is_a_crop_of_the_reflected_image(self, batch: Tensor) -> None:
        transform = PerImageCrop(2)
        offsets = transform.make_params([batch])["offsets"]
        out = transform.transform(batch, {"offsets": offsets})
        for image, cropped, row, column in zip(batch, out, *offsets.tolist(), strict=True):
            padded = v2.functional.pad(image, [2], padding_mode="reflect")
            assert torch.equal(cropped, v2.functional.crop(padded, row, column, 12, 12))
        # Each image has a crop of its own, and every offset comes up.
        assert offsets.unique().tolist() == [0, 1, 2, 3, 4]

    def test_flip(self, batch: Tensor) -> None:
        out = PerImageFlip()(batch)
        same = (out == batch).flatten(1).all(1)
        mirrored = (out == batch.flip(-1)).flatten(1).all(1)
        assert (same ^ mirrored).all()
        assert 16 <= mirrored.sum() <= 48
        assert torch.equal(PerImageFlip(0.0)(batch), batch)

    def test_labels_pass_through(self, batch: Tensor) -> None:
        labels = torch.arange(64)
        assert torch.equal(v2.Compose([PerImageCrop(1), PerImageFlip()])(batch, labels)[1], labels)

    def test_border_larger_than_the_image(self, batch: Tensor) -> None:
        with pytest.raises(ValueError, match="reflected border of 12"):
            PerImageCrop(12)(batch)


class TestLoading:
    def test_an_epoch_has_every_image_once(self) -> None:
        batches = EpochBatches(10, 4, seed=3)
        assert len(batches) == 3
        assert sorted(torch.cat([indices for indices, _ in batches]).tolist()) == list(range(10))

    def test_drop_last(self) -> None:
        assert [len(indices) for indices, _ in EpochBatches(10, 4, drop_last=True)] == [4, 4]
        assert [len(indices) for indices, _ in EpochBatches(3, 4, drop_last=True)] == [3]

    def test_epochs_differ_and_repeat(self) -> None:
        def epoch(number: int, seed: int = 0) -> list[int]:
            batches = EpochBatches(50, 8, seed=seed)
            batches.set_epoch(number)
            return torch.cat([indices for indices, _ in batches]).tolist()

        assert epoch(1) == epoch(1)
        assert epoch(1) != epoch(2)
        assert epoch(1) != epoch(1, seed=1)
        assert epoch(1) != epoch(0, seed=1)

    def test_batches_repeat_and_leave_the_global_generator_alone(self) -> None:
        data = load("digits", limit=40, test_limit=10)
        torch.manual_seed(1)
        first = list(training_loader(data, 16, seed=5))
        state = torch.get_rng_state()
        torch.manual_seed(2)
        second = list(training_loader(data, 16, seed=5))
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)
        for (images, labels), (again, same) in zip(first, second, strict=True):
            assert images.shape == (16, 3, 32, 32)
            assert torch.equal(images, again)
            assert torch.equal(labels, same)

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("crop", [0, 2])
    def test_what_a_training_batch_is_made_of(self, crop: int, flip: bool) -> None:
        """The images of the seed's order, each as one of its crops, mirrored or not, and normalised."""
        data = load("digits", size=12, limit=24)
        loader = training_loader(data, 8, seed=5, crop=crop, flip=flip)
        found = set()
        for (images, labels), (indices, _) in zip(loader, EpochBatches(24, 8, seed=5), strict=True):
            assert torch.equal(labels, data.train.labels[indices])
            plain = (data.train.images[indices].float() / 255 - data.mean[0]) / data.std[0]
            padded = v2.functional.pad(plain, [crop], padding_mode="reflect")
            for image, whole in zip(images, padded, strict=True):
                candidates = itertools.product(range(2 * crop + 1), range(2 * crop + 1), (False, True))
                for row, column, mirrored in candidates:
                    cut = whole[:, row : row + 12, column : column + 12]
                    if torch.allclose(image, cut.flip(-1) if mirrored else cut, atol=1e-5):
                        found.add((row, column, mirrored))
                        break
                else:
                    raise AssertionError("an image is none of its own crops")
        assert (len({at[:2] for at in found}) > 1) == (crop > 0)
        assert {mirrored for *_, mirrored in found} == ({False, True} if flip else {False})

    def test_evaluation_is_in_order_and_normalised(self) -> None:
        data = load("digits", limit=4)
        images, labels = map(torch.cat, zip(*evaluation_loader(data, 100), strict=True))
        assert torch.equal(labels, data.test.labels)
        expected = (data.test.images.float() / 255 - data.mean[0]) / data.std[0]
        torch.testing.assert_close(images, expected.expand(-1, 3, -1, -1), atol=1e-6, rtol=1e-6)

    def test_no_images(self) -> None:
        with pytest.raises(ValueError, match="0 images"):
            EpochBatches(0, 4)
