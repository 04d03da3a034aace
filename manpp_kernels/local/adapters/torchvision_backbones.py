"""The networks below torchvision's models of segmentation and detection: a ResNet or a MobileNet without its head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from manpp_kernels.local.parts import joined_units


def backbone_units(backbone: nn.Module, prefix: str) -> tuple[nn.Sequential, dict[str, nn.Module]]:
    """The stem and the residual blocks, whose names begin with ``prefix``."""
    row: list[tuple[str | None, nn.Module]] = []
    for name, child in backbone.named_children():
        if name.startswith("layer"):  # a stage of a ResNet
            row += [(f"{prefix}{name}.{block}", unit) for block, unit in child.named_children()]
        else:  # a block of a MobileNet but for the first, or what a ResNet begins with
            row.append((f"{prefix}{name}" if name.isdecimal() and name != "0" else None, child))
    return joined_units(row)


def reduction(stem: nn.Sequential, units: Mapping[str, nn.Module], last: str | None = None) -> int:
    """By how much stem and units, up to the unit ``last`` (None: all), reduce height and width.

    Each layer of the stem, or of a row of layers, does so once, and each unit.
    """
    names = list(units)
    up_to = names if last is None else names[: names.index(last) + 1]
    found = 1
    for module in (stem, *(units[name] for name in up_to)):
        for part in module if isinstance(module, nn.Sequential) else [module]:
            strides = (m.stride for m in part.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d))
            found *= max((s if isinstance(s, int) else max(s) for s in strides), default=1)
    return found
