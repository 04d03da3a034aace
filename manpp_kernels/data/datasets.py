"""The image sets that ``manpp train`` knows, decoded once into uint8 tensors where they are small enough for that."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torchvision import datasets as tv
from torchvision.transforms import v2

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# A folder of images that is larger than this once decoded is read from its files in every epoch instead.
MEMORY_LIMIT = 1 << 30
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """A set of images that is not there or cannot be read; the message says what to do."""


class ImageSource(Protocol):
    """Images by index: a uint8 batch (N, C, H, W) and its labels."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class MemoryImages:
    """Decoded images: uint8 (N, C, H, W), C = 1 or 3, and their labels, int64 (N)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.labels.device)
        return self.images[indices], self.labels[indices]

    def first(self, count: int | None) -> MemoryImages:
        return MemoryImages(self.images[:count], self.labels[:count])

    def resized(self, size: int) -> MemoryImages:
        if self.images.shape[-2:] == (size, size):
            return self
        return MemoryImages(v2.functional.resize(self.images, [size, size], antialias=True), self.labels)

    def to(self, device: torch.device) -> MemoryImages:
        return MemoryImages(self.images.to(device), self.labels.to(device))


@dataclass
class FileImages:
    """Images that are decoded whenever they are asked for; ``transform`` makes each a uint8 (3, H, W)."""

    files: list[str]
    labels: Tensor
    transform: v2.Transform
    read: Callable[[str], Any] = field(default=tv.folder.pil_loader)

    def __len__(self) -> int:
        return len(self.files)

    def _decode(self, index: int) -> Tensor:
        try:
            return self.transform(self.read(self.files[index]))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.files[index]} cannot be read as an image: {error}") from error

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self._decode(i) for i in indices.tolist()]), self.labels[indices]

    def first(self, count: int | None) -> FileImages:
        return FileImages(self.files[:count], self.labels[:count], self.transform, self.read)

    def decoded(self) -> MemoryImages:
        """All images in memory; their transform has to be one without randomness."""
        with ThreadPoolExecutor() as pool:
            return MemoryImages(torch.stack(list(pool.map(self._decode, range(len(self))))), self.labels)


@dataclass
class ImageData:
    """A training and a test set, and what training on them needs to know."""

    train: MemoryImages | FileImages
    test: MemoryImages | FileImages
    num_classes: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: int
    flip: bool


Splits = tuple[MemoryImages, MemoryImages]


@dataclass(frozen=True)
class DatasetInfo:
    """How a set is read, and its recipe: input size, normalisation, pixels to shift by, whether to mirror."""

    read: Callable[[Path, bool], Splits]
    num_classes: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: int
    flip: bool


def _stratified(labels: Any, what: str) -> tuple[Any, Any]:
    """Fixed shuffled indices of a training and a test part, four to one in every class."""
    from sklearn.model_selection import train_test_split

    try:
        return tuple(train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0))  # type: ignore[return-value]
    except ValueError as error:
        raise DataError(f"{what} has too few images to be split into a training and a test part: {error}") from error


def _digits(root: Path, download: bool) -> Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = _stratified(digits.target, "digits")
    return MemoryImages(images[train], labels[train]), MemoryImages(images[test], labels[test])


def read_idx(path: Path) -> Tensor:
    """A uint8 tensor from a file in MNIST's idx format, gzip-compressed or not (torchvision reads the latter only)."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    dimensions = content[3] if len(content) > 3 else 0
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], ">u4") if len(content) >= header else np.empty(0)
    if content[:3] != b"\0\0\x08" or not dimensions or len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} is not a complete idx file of bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(*map(int, shape))


def _find_idx(folder: Path, part: str) -> tuple[Path, Path] | None:
    for suffix in ("", ".gz"):
        images = folder / f"{part}-images-idx3-ubyte{suffix}"
        labels = folder / f"{part}-labels-idx1-ubyte{suffix}"
        if images.is_file() and labels.is_file():
            return images, labels
    return None


def _fashion_mnist(root: Path, download: bool) -> Splits:
    for folder in (root, root / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST):
        train, test = _find_idx(folder, "train"), _find_idx(folder, "t10k")
        if train and test:
            return _idx_images(*train), _idx_images(*test)
    return _torchvision(tv.FashionMNIST, "fashion-mnist", root, download, {"train": True}, {"train": False})


def _idx_images(images_file: Path, labels_file: Path) -> MemoryImages:
    images, labels = read_idx(images_file), read_idx(labels_file).long()
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{images_file} holds {tuple(images.shape)} and {labels_file.name} {tuple(labels.shape)}: "
            "they do not belong together"
        )
    return MemoryImages(images.unsqueeze(1), labels)


def _torchvision(
    dataset: Callable[..., Any], name: str, root: Path, download: bool, train: dict[str, Any], test: dict[str, Any]
) -> Splits:
    """The two parts of a torchvision dataset whose ``data`` is an array in memory."""
    parts = []
    for options in (train, test):
        try:
            source = dataset(root, download=download, **options)
        except (RuntimeError, OSError) as error:
            if download:
                raise DataError(f"{name} could not be downloaded to {root}: {error}") from error
            raise DataError(f"{name} is not in {root}: give its folder (--data-root), or --download it") from error
        images = torch.as_tensor(source.data)
        if images.dim() == 3:
            images = images.unsqueeze(1)
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = source.targets if hasattr(source, "targets") else source.labels
        parts.append(MemoryImages(images, torch.as_tensor(labels).long()))
    return parts[0], parts[1]


def _by_train(dataset: Callable[..., Any], name: str) -> Callable[[Path, bool], Splits]:
    return lambda root, download: _torchvision(dataset, name, root, download, {"train": True}, {"train": False})


def _by_split(dataset: Callable[..., Any], name: str) -> Callable[[Path, bool], Splits]:
    return lambda root, download: _torchvision(dataset, name, root, download, {"split": "train"}, {"split": "test"})


# Crop and flip of CIFAR, SVHN and STL-10 are those of the published runs. Digits and house numbers are not mirrored:
# a mirrored 2 is no 2.
DATASETS = {
    "digits": DatasetInfo(_digits, 10, 32, (0.305,) * 3, (0.376,) * 3, 2, False),
    "fashion-mnist": DatasetInfo(_fashion_mnist, 10, 32, (0.286,) * 3, (0.353,) * 3, 2, True),
    "cifar10": DatasetInfo(
        _by_train(tv.CIFAR10, "cifar10"), 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, True
    ),
    "cifar100": DatasetInfo(
        _by_train(tv.CIFAR100, "cifar100"), 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 4, True
    ),
    "svhn": DatasetInfo(
        _by_split(tv.SVHN, "svhn"), 10, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), 2, False
    ),
    "stl10": DatasetInfo(
        _by_split(tv.STL10, "stl10"), 10, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), 4, True
    ),
}


def load(
    name: str,
    root: str | Path = "data",
    *,
    size: int | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    download: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageData:
    """Read a set of images.

    Args:
        name: one of :data:`DATASETS`, or ``folder:PATH`` for a folder of images with one folder a class, either as
            ``PATH/train/CLASS`` and ``PATH/val/CLASS`` (or ``test``), or as ``PATH/CLASS``, of which a fixed fifth of
            every class then becomes the test set.
        root: where the files are, or are to be downloaded to.
        size: width and height of the images; None for the set's usual one.
        limit, test_limit: keep this many training and test images, the first ones. Files of a folder are put into a
            fixed random order before, as they are sorted by class.
        download: let torchvision fetch what is not there.
        memory_limit: a folder whose decoded images take more bytes than this is read from its files in every epoch.

    Raises:
        DataError: there is no such set, or its files are missing or damaged.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return _folder(Path(path), size or 224, limit, test_limit, memory_limit)
    if name not in DATASETS:
        raise DataError(f"there is no set of images {name!r}; there are {', '.join(DATASETS)} and folder:PATH")
    info = DATASETS[name]
    size = size or info.size
    train, test = info.read(Path(root), download)
    return ImageData(
        train.first(limit).resized(size),
        test.first(test_limit).resized(size),
        info.num_classes,
        size,
        info.mean,
        info.std,
        info.crop,
        info.flip,
    )


def _folder(path: Path, size: int, limit: int | None, test_limit: int | None, memory_limit: int) -> ImageData:
    plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    randomly = v2.Compose([v2.RandomResizedCrop(size), v2.PILToTensor()])
    if not path.is_dir():
        raise DataError(f"there is no folder {path}: give one with a folder of images for each class, as folder:PATH")
    if (path / "train").is_dir():
        tests = [path / name for name in ("val", "test", "valid") if (path / name).is_dir()]
        if not tests:
            raise DataError(f"{path} has a folder train, and none for the test set: val, test or valid")
        train, classes = _image_files(path / "train", plain)
        test, test_classes = _image_files(tests[0], plain)
        if classes != test_classes:
            raise DataError(f"{path / 'train'} and {tests[0]} do not have the same classes")
    else:
        files, classes = _image_files(path, plain)
        parts = (_pick(files, torch.as_tensor(part)) for part in _stratified(files.labels.numpy(), str(path)))
        train, test = parts
    train, test = train.first(limit), test.first(test_limit)

    def fits(images: FileImages) -> bool:
        return len(images) * 3 * size * size <= memory_limit

    train.transform = plain if fits(train) else randomly
    return ImageData(
        train.decoded() if fits(train) else train,
        test.decoded() if fits(test) else test,
        len(classes),
        size,
        IMAGENET_MEAN,
        IMAGENET_STD,
        # Images read from files have been cropped at random already.
        size // 8 if fits(train) else 0,
        True,
    )


def _image_files(path: Path, transform: v2.Transform) -> tuple[FileImages, list[str]]:
    try:
        found = _ClassFolders(path)
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{path} has no images in one folder a class: {error}") from error
    files = FileImages([file for file, _ in found.samples], torch.tensor(found.targets), transform)
    return _pick(files, torch.randperm(len(files), generator=torch.Generator().manual_seed(0))), found.classes


class _ClassFolders(tv.ImageFolder):
    """What is hidden is no class and no image: notebooks, file managers and version control leave such beside them."""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not _hidden(name)]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: i for i, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory: Any, class_to_idx: dict[str, int], *args: Any, **options: Any) -> list[tuple[str, int]]:
        samples = tv.ImageFolder.make_dataset(directory, class_to_idx, *args, **options)
        seen = [(file, i) for file, i in samples if not any(map(_hidden, Path(file).relative_to(directory).parts))]
        bare = sorted(set(class_to_idx.values()) - {i for _, i in seen})
        if bare:  # which torchvision says of those without any file
            name = next(name for name, i in class_to_idx.items() if i == bare[0])
            raise FileNotFoundError(f"Found no image that is not hidden for the class {name}")
        return seen


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _pick(files: FileImages, order: Tensor) -> FileImages:
    return FileImages([files.files[i] for i in order.tolist()], files.labels[order], files.transform, files.read)
