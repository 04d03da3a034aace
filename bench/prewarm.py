"""Compile the peers of a benchmark ahead of it, into the compiler's cache on disk, while nothing is timed.

    python bench/prewarm.py bench_detach_copy ["SIZE"]

All its cases, or those of one size.
"""

from __future__ import annotations

import importlib
import sys

import torch
from common import COMPILE, DEVICE


def main(module: str, size: str | None = None) -> int:
    for case in importlib.import_module(module).cases() if COMPILE else ():
        if size is not None and case.size != size:
            continue
        for contender in case.build(1):
            if contender.name.startswith("compiled"):
                contender.calls[0]()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
