"""Loaders whose every batch is a function of the seed, the epoch and its place in the epoch.

Nothing about the data has to be saved to resume a run: the order of an epoch and the crops and flips of each batch are
drawn from generators seeded with those three numbers, and never from, nor into, torch's global generator.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from manpp_kernels.data.augment import evaluation_transform, training_transform
from manpp_kernels.data.datasets import ImageData, ImageSource, MemoryImages

# What a sampler hands to the dataset for one batch: the indices of its images, and the seed of its augmentation.
BatchKey = tuple[Tensor, int]
Share = tuple[int, int]
ALONE: Share = (0, 1)


class EpochBatches(Sampler[BatchKey]):
    """The batches of an epoch. ``set_epoch`` chooses the epoch, as for ``torch.utils.data.DistributedSampler``.

    Args:
        length: how many images there are.
        batch_size: images a batch.
        seed: of the order and of the augmentation.
        shuffle: a new random order every epoch; otherwise the images' own order.
        drop_last: leave out a smaller last batch, unless it is the only one.
        share: the number of a process and how many there are, each of which gets its part of every batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        share: Share = ALONE,
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"there are {length} images for batches of {batch_size}: both have to be 1 or more")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last and length >= batch_size
        self.rank, self.ranks = share
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size if self.drop_last else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        seeds = torch.randint(1 << 62, (len(self),), generator=generator).tolist()
        for batch, seed in zip(order.split(self.batch_size), seeds, strict=False):  # one seed fewer: the last dropped
            part = batch[self.rank :: self.ranks]
            if len(part):
                yield part, seed + self.rank


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches of images, transformed; one 'item' of this dataset is a batch."""

    def __init__(self, images: ImageSource, transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        indices, seed = key
        # Transforms draw from the global generator. devices=[]: they draw on the CPU only.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            images, labels = self.images.batch(indices)
            return self.transform(images), labels


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(images: ImageSource, transform: v2.Transform, batches: EpochBatches, workers: int) -> DataLoader[Any]:
    in_memory = isinstance(images, MemoryImages)
    return DataLoader(
        _Batches(images, transform),
        sampler=batches,
        batch_size=None,  # the sampler makes the batches
        num_workers=0 if in_memory else workers,
        pin_memory=not in_memory and torch.cuda.is_available(),
        persistent_workers=not in_memory and workers > 0,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),  # its own, so that starting an epoch leaves the global generator as it is
    )


def training_loader(
    data: ImageData,
    batch_size: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    crop: int | None = None,
    flip: bool | None = None,
    workers: int = 0,
    share: Share = ALONE,
) -> DataLoader[Any]:
    """Augmented batches in an order of their own for every epoch; call ``loader.sampler.set_epoch`` before each.

    Args:
        device: where images that are in memory are kept, augmented and handed out.
        crop, flip: pixels to shift by and whether to mirror; None for the set's recipe.
        workers: processes that decode images which are not in memory.
        share: (number, count) of this process among those that train: its part of every batch, which is of all.

    Raises:
        ValueError: ``crop`` is as large as the images.
    """
    crop = data.crop if crop is None else crop
    if crop >= data.size:
        raise ValueError(
            f"crop is {crop}, and images of {data.size}x{data.size} can be shifted on their reflected border by "
            f"{data.size - 1} pixels at most; choose a smaller crop, or larger images"
        )
    transform = training_transform(crop, data.flip if flip is None else flip, data.mean, data.std)
    images = _placed(data.train, device)
    # A last batch of one image would break batch normalisation.
    batches = EpochBatches(len(images), batch_size, seed=seed, drop_last=True, share=share)
    return _loader(images, transform, batches, workers)


def evaluation_loader(
    data: ImageData, batch_size: int, *, device: torch.device | str = "cpu", workers: int = 0, share: Share = ALONE
) -> DataLoader[Any]:
    """The test images, in order and without augmentation; of several processes each gets its part."""
    images = _placed(data.test, device)
    batches = EpochBatches(len(images), batch_size, shuffle=False, share=share)
    return _loader(images, evaluation_transform(data.mean, data.std), batches, workers)


def _placed(images: Any, device: torch.device | str) -> Any:
    return images.to(torch.device(device)) if isinstance(images, MemoryImages) else images
