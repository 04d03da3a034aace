"""The three kinds of features that auxiliary networks take, and the ways from one to another.

Maps (N, C, H, W) come from convolutional networks, tokens (N, T, C) from transformers, vectors (N, D) from neither. A
first token beside a square grid of others (T = g^2 + 1) is taken to be a class token.
"""

from __future__ import annotations

import math

from torch import Size, Tensor, nn

from manpp_kernels.models.cifar_resnet import init_weights


def describe(features: Size) -> str:
    """The shape as a sentence shows it; the number of images in the example means nothing."""
    return f"(N, {', '.join(map(str, features[1:]))})"


def require(what: str, features: Size, dimensions: tuple[int, ...] = (2, 3, 4)) -> None:
    """Raise ValueError where an auxiliary network, ``what``, cannot take features of this shape."""
    kinds = {2: "vectors (N, D)", 3: "tokens (N, T, C)", 4: "maps (N, C, H, W)"}
    if len(features) not in dimensions:
        raise ValueError(
            f"{what} takes {' or '.join(kinds[d] for d in dimensions)}, and the features here are "
            f"{describe(features)}; choose other boundaries, or a rule whose auxiliary network takes such features"
        )


def has_class_token(tokens: int) -> bool:
    """Whether the first of T tokens is a class token: the others form a square grid, and all of them do not."""
    return math.isqrt(tokens) ** 2 != tokens and math.isqrt(tokens - 1) ** 2 == tokens - 1


class TokenPool(nn.Module):
    """Tokens (N, T, C) to vectors (N, C): the class token, or the mean where there is none."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.class_token = has_class_token(tokens)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.class_token else x.mean(1)


class TokenMap(nn.Module):
    """Tokens (N, T, C) to a map (N, C, g, g) of the square grid they come from, without the class token.

    Raises:
        ValueError: the tokens form no square grid.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.skip = int(has_class_token(tokens))
        self.side = math.isqrt(tokens - self.skip)
        if self.side**2 + self.skip != tokens:
            raise ValueError(
                f"{tokens} tokens form no square grid, with or without a class token, so they cannot be taken as a "
                "map; use square images, or a rule that needs no map (dgl, man, man++ with host dgl)"
            )

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.skip :].transpose(1, 2).unflatten(2, (self.side, self.side))


class VectorMap(nn.Module):
    """Vectors (N, D) to a map of one pixel (N, D, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, None, None]


def to_map(what: str, features: Size) -> tuple[nn.Module, Size]:
    """A module that gives ``features`` as a map, and the shape of the map; ``what`` is named in errors."""
    require(what, features)
    if len(features) == 4:
        return nn.Identity(), features
    if len(features) == 2:
        return VectorMap(), Size((*features, 1, 1))
    grid = TokenMap(features[1])
    return grid, Size((features[0], features[2], grid.side, grid.side))


def to_vector(what: str, features: Size) -> tuple[list[nn.Module], int]:
    """Layers that give ``features`` as vectors (N, D), and D.

    Maps are averaged over space; of tokens the class token or the mean is taken, and normalised (LayerNorm) as
    transformers do in front of a classifier; vectors stay as they are.
    """
    require(what, features)
    if len(features) == 4:
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten()], features[1]
    if len(features) == 3:
        return [TokenPool(features[1]), nn.LayerNorm(features[2])], features[2]
    return [], features[1]


def linear_head(features: Size, num_classes: int, what: str = "the linear head") -> nn.Sequential:
    """Pooling and one linear layer: features of any kind to logits (N, num_classes)."""
    layers, width = to_vector(what, features)
    head = nn.Sequential(*layers, nn.Linear(width, num_classes))
    init_weights(head)
    return head
