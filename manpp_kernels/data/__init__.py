"""Image data for training: sets decoded once into memory, batch augmentation, and an order that can be resumed."""

from manpp_kernels.data.augment import PerImageCrop, PerImageFlip, evaluation_transform, training_transform
from manpp_kernels.data.datasets import DATASETS, DataError, ImageData, MemoryImages, load
from manpp_kernels.data.loading import EpochBatches, evaluation_loader, training_loader

__all__ = [
    "DATASETS",
    "DataError",
    "EpochBatches",
    "ImageData",
    "MemoryImages",
    "PerImageCrop",
    "PerImageFlip",
    "evaluation_loader",
    "evaluation_transform",
    "load",
    "training_loader",
    "training_transform",
]
