"""Losses of local learning beside cross-entropy, each over a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _full_precision(x: Tensor) -> Tensor:
    """float32 in place of a half precision: similarities near 1 differ by less than those resolve."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _counted(targets: Tensor, ignored: int | None) -> Tensor:
    """Which images count, (N,) of bool: all but those of the class number ``ignored``."""
    if ignored is None or targets.is_floating_point():
        return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    return targets != ignored


def supervised_contrastive(
    embeddings: Tensor, targets: Tensor, temperature: float = 0.07, ignored: int | None = None
) -> Tensor:
    """Supervised contrastive loss: Khosla et al., NeurIPS 2020, equation 2, with one view of each image.

    With z_i the normalised embeddings, P(i) the other images of i's class and A(i) all other images::

        L = mean_i  -1/|P(i)| sum_{p in P(i)} log( exp(z_i z_p / t) / sum_{a in A(i)} exp(z_i z_a / t) )

    Images that are alone of their class in the batch have no P(i) and are left out of the mean.

    Args:
        embeddings: (N, D), floating; normalised here.
        targets: class numbers (N,).
        temperature: t.
        ignored: the class number of images that count nowhere, as if they were not there.

    Returns:
        A scalar; 0 where no class has two images.

    Raises:
        ValueError: the targets are no class numbers.
    """
    if targets.is_floating_point() or targets.dim() != 1:
        raise ValueError(
            f"the contrastive loss needs class numbers (N,), and the targets are {targets.dtype} of the shape "
            f"{tuple(targets.shape)}; use loss='cross-entropy' with soft labels"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(_full_precision(embeddings), dim=1)
        similarity = z @ z.T / temperature
        counted = _counted(targets, ignored)
        others = counted[None, :] & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (targets[:, None] == targets[None, :]) & counted[:, None] & others
        counts = positive.sum(1)
        # An image without a P(i) may be without an A(i), too, whose sum would be no number, and no gradient either.
        left_out = ~others & (counts > 0)[:, None]
        log_probability = similarity - similarity.masked_fill(left_out, -torch.inf).logsumexp(1, keepdim=True)
        per_image = -(log_probability * positive).sum(1) / counts.clamp(min=1)
        return per_image.sum() / (counts > 0).sum().clamp(min=1)


def similarity_matrix(vectors: Tensor) -> Tensor:
    """Cosine similarities (N, N) of vectors (N, D), each with its own mean over D taken off."""
    with torch.autocast(vectors.device.type, enabled=False):
        z = _full_precision(vectors)
        z = F.normalize(z - z.mean(1, keepdim=True), dim=1, eps=1e-8)
        return z @ z.T


def similarity_matching(vectors: Tensor, targets: Tensor, num_classes: int, ignored: int | None = None) -> Tensor:
    """Mean squared difference of the images' similarities and their labels': Nøkland and Eidnes, ICML 2019, equation 2.

    Args:
        vectors: (N, D), floating.
        targets: class numbers (N,), or their probabilities (N, num_classes).
        num_classes: of the one-hot vectors that class numbers are taken as.
        ignored: the class number of images that count nowhere, as if they were not there.

    Returns:
        A scalar, the mean over N x N; 0 where no image counts.
    """
    counted = _counted(targets, ignored)
    labels = targets if targets.is_floating_point() else F.one_hot(targets.long() * counted, num_classes)
    wanted = similarity_matrix(labels.to(_full_precision(vectors).dtype))
    pairs = counted[:, None] & counted[None, :]
    return ((similarity_matrix(vectors) - wanted).square() * pairs).sum() / pairs.sum().clamp(min=1)
