"""Losses of local learning beside cross-entropy, each over a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _full_precision(x: Tensor) -> Tensor:
    """float32 in place of a half precision: similarities near 1 differ by less than those resolve."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def supervised_contrastive(embeddings: Tensor, targets: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss: Khosla et al., NeurIPS 2020, equation 2, with one view of each image.

    With z_i the normalised embeddings, P(i) the other images of i's class and A(i) all other images::

        L = mean_i  -1/|P(i)| sum_{p in P(i)} log( exp(z_i z_p / t) / sum_{a in A(i)} exp(z_i z_a / t) )

    Images that are alone of their class in the batch have no P(i) and are left out of the mean.

    Args:
        embeddings: (N, D), floating; normalised here.
        targets: class numbers (N,).
        temperature: t.

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
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_probability = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        positive = (targets[:, None] == targets[None, :]) & ~itself
        counts = positive.sum(1)
        per_image = -(log_probability * positive).sum(1) / counts.clamp(min=1)
        return per_image.sum() / (counts > 0).sum().clamp(min=1)


def similarity_matrix(vectors: Tensor) -> Tensor:
    """Cosine similarities (N, N) of vectors (N, D), each with its own mean over D taken off."""
    with torch.autocast(vectors.device.type, enabled=False):
        z = _full_precision(vectors)
        z = F.normalize(z - z.mean(1, keepdim=True), dim=1, eps=1e-8)
        return z @ z.T


def similarity_matching(vectors: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Mean squared difference of the images' similarities and their labels': Nøkland and Eidnes, ICML 2019, equation 2.

    Args:
        vectors: (N, D), floating.
        targets: class numbers (N,), or their probabilities (N, num_classes).
        num_classes: of the one-hot vectors that class numbers are taken as.

    Returns:
        A scalar, the mean over N x N.
    """
    labels = targets if targets.is_floating_point() else F.one_hot(targets, num_classes)
    wanted = similarity_matrix(labels.to(_full_precision(vectors).dtype))
    return (similarity_matrix(vectors) - wanted).square().mean()
