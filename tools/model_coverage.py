"""How many of timm's architectures come apart into stem, units and head, by their classes.

    python tools/model_coverage.py

Every name that timm lists is made on the meta device, without weights, and given to its adapter. That its parts are the
model itself is checked where it is trained, and of the smaller ones in the tests.
"""

from __future__ import annotations

import warnings
from collections import Counter

import timm
import torch

from manpp_kernels.local.parts import take_apart


def main() -> None:
    warnings.simplefilter("ignore")
    names, listed, adapted = timm.list_models(), Counter[str](), Counter[str]()
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        cls = f"{type(model).__module__}.{type(model).__name__}"
        listed[cls] += 1
        try:
            take_apart(model)
        except TypeError:  # there is no adapter, or it refuses this one
            continue
        adapted[cls] += 1
    for cls, count in listed.most_common():
        print(f"{adapted[cls]:5} of {count:3}  {cls}")
    print(f"{adapted.total():5} of the {listed.total()} architectures that timm {timm.__version__} lists")


if __name__ == "__main__":
    main()
