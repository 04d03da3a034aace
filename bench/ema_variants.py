"""Other ways for the blocks of a GPU to share out the EMA's tensors, beside the one that is built in.

    python bench/ema_variants.py [--json PATH]        (needs nvcc, and a GPU of compute capability 9.0 or later)

Each is a kernel in ema_variants.cu, for float32 without effective weights: persistent blocks, a warp for each piece, so
that tiny tensors share a block, and copies by cp.async.bulk.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_ema_scale_update import FP32, ON_CUDA
from common import DEVICE, Case, run_cases
from ema_contenders import MOMENTUM, Inputs, headline, make_inputs, ours
from tensors import SIZES, elements
from timing import Call, Contender
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cu")
# The function of the library, and the elements of a piece.
VARIANTS = {
    "a block a chunk": ("ema_chunks", 4096),
    "a block a chunk of 2,048": ("ema_chunks", 2048),
    "persistent blocks": ("ema_persistent", 4096),
    "a warp a piece of 512": ("ema_warps", 512),
    "a warp a piece of 1,024": ("ema_warps", 1024),
    "cp.async.bulk": ("ema_bulk", 4096),
}


def compile_library(folder: Path, architecture: str) -> Path:
    """Build ema_variants.cu for an architecture, as ``sm_90``."""
    library = folder / "ema_variants.so"
    headers = Path(torch.__file__).parent / "include"  # of the dtypes that the package's arithmetic knows
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", f"-I{headers}"]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
    return library


def pieces(x: Inputs, length: int) -> Tensor:
    """The kernels' table: addresses of EMA and parameter, and elements, of pieces of at most ``length``."""
    rows = [
        (e.data_ptr() + first * e.itemsize, p.data_ptr() + first * p.itemsize, min(length, e.numel() - first))
        for e, p in zip(x.ema, x.params, strict=True)
        for first in range(0, e.numel(), length)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def call_of(function: Callable[..., int], x: Inputs, length: int) -> Call:
    table = pieces(x, length)

    def call() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        address, keep, take = ctypes.c_void_p(table.data_ptr()), ctypes.c_float(MOMENTUM), ctypes.c_float(1 - MOMENTUM)
        error = function(address, len(table), keep, take, stream)
        if error:
            raise RuntimeError(f"CUDA error {error}")

    return call


def contenders(library: ctypes.CDLL, size: str, sets: int) -> list[Contender]:
    inputs = [make_inputs(SIZES[size](), FP32, 1) for _ in range(sets)]
    found = [c for c in ours(inputs, FP32) if c.name == headline()]
    for name, (function, length) in VARIANTS.items():
        before = [e.clone() for e in inputs[0].ema]
        calls = [call_of(getattr(library, function), x, length) for x in inputs]
        calls[0]()
        for e, b, p in zip(inputs[0].ema, before, inputs[0].params, strict=True):
            torch.testing.assert_close(e, (MOMENTUM * b.double() + (1 - MOMENTUM) * p.double()).float())
        found.append(Contender(name, calls, ours=True))
    return found


def case(library: ctypes.CDLL, size: str) -> Case:
    count = elements(SIZES[size]())
    return Case(
        operator="ema_variants",
        work="update",
        size=size,
        dtypes=FP32.name,
        tensors=len(SIZES[size]()),
        elements=count,
        moved=count * FP32.bytes_per_element(),
        footprint=count * FP32.footprint_per_element(),
        headline=headline(),
        build=functools.partial(contenders, library, size),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    if DEVICE.type != "cuda":
        print("ema_variants.py: these are kernels of a GPU, and there is none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        library = ctypes.CDLL(str(compile_library(Path(folder), architecture)))
        run_cases((case(library, size) for size in ON_CUDA), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
