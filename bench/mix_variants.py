"""The backward pass of ``scale_bias_mix`` on a GPU with other sizes of its launches, beside those that are built in.

    python bench/mix_variants.py [--json PATH] [kTeam=512 kRowFlight=4,kSegment=1024 ...]        (needs nvcc, and a GPU)

A variant gives other values to constants of csrc/cuda/scale_bias_mix_backward.cu and reduce.cuh.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_scale_bias_mix import TOTAL, Variant, make_inputs
from common import DEVICE, ROOT, Case, run_cases
from feature_maps import FORMATS, LARGE, MAPS, elements
from timing import Contender

HOMES = ("cuda/scale_bias_mix_backward.cu", "cuda/reduce.cuh")
SOURCES = ("table.cpp", "mix_tensors.cpp", "cuda/common.cu", "cuda/arrivals.cu", HOMES[0])
USUAL = (
    "kTeam=1024",
    "kTeam=64",
    "kSegment=1024",
    "kRowFlight=4,kSegment=1024",
    "kPixelFlight=2",
    "kRowBlocks=16384,kPixelBlocks=8192",
)
BUILT_IN = "as built in"
Backward = Callable[..., Any]


def constants_of(variant: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (pair.partition("=") for pair in variant.split(","))}


def write_sources(folder: Path, constants: Mapping[str, int]) -> Path:
    """A copy of csrc in which the constants have other values."""
    copy = Path(shutil.copytree(ROOT / "csrc", folder / "csrc"))
    for name, value in constants.items():
        found = 0
        for home in HOMES:
            text, count = re.subn(
                rf"\b(constexpr \w+ {name} = )[^;]+;", rf"\g<1>{value};", (copy / home).read_text(encoding="utf-8")
            )
            (copy / home).write_text(text, encoding="utf-8")
            found += count
        if found != 1:
            raise ValueError(f"{' and '.join(HOMES)} define the constant {name} {found} times")
    return copy


def compile_library(sources: Path, namespace: str, architecture: str) -> Path:
    """The operator alone, in a namespace of its own, so that several can be loaded."""
    library, headers = sources.parent / f"{namespace}.so", Path(torch.__file__).parent
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "--expt-relaxed-constexpr", "--fmad=false"]
    command += ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-Dmanpp_kernels={namespace}", "-DUSE_CUDA"]
    command += ["-DMANPP_WITH_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    includes = (headers / "include", headers / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
    command += [*(f"-I{folder}" for folder in includes), f"-L{headers}/lib", "-ltorch_cpu"]
    subprocess.run([*command, *(str(sources / s) for s in SOURCES), "-o", str(library)], check=True)
    return library


def load(library: Path, namespace: str) -> Backward:
    schema = str(torch.ops.manpp_kernels.scale_bias_mix_backward.default._schema).partition("::")[2]
    torch.library.define(f"{namespace}::{schema.partition('(')[0]}", schema[schema.index("(") :])
    torch.ops.load_library(str(library))
    operator: Backward = getattr(torch.ops, namespace).scale_bias_mix_backward.default
    return operator


def contenders(operators: Mapping[str, Backward], v: Variant, sets: int) -> list[Contender]:
    arguments = [(x.grad, x.lb, x.ema, x.scale, TOTAL, True, True) for x in (make_inputs(v) for _ in range(sets))]
    *maps, scale = operators[BUILT_IN](*arguments[0])
    found = []
    for name, operator in operators.items():
        *of_maps, of_scale = operator(*arguments[0])
        torch.testing.assert_close(of_maps, maps, rtol=0, atol=0)
        torch.testing.assert_close(of_scale, scale, rtol=1e-3, atol=1e-3 * float(scale.abs().max()))
        found.append(Contender(name, [functools.partial(operator, *a) for a in arguments], ours=True))
    return found


def case(operators: Mapping[str, Backward], v: Variant) -> Case:
    moved = 5 * elements(v.size) * v.dtype.itemsize
    return Case(
        operator="mix_variants",
        work="backward",
        size=v.size,
        dtypes=str(v),
        tensors=1,
        elements=elements(v.size),
        moved=moved,
        footprint=moved,
        headline=BUILT_IN,
        build=functools.partial(contenders, operators, v),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=USUAL, metavar="NAME=VALUE[,NAME=VALUE...]")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    if DEVICE.type != "cuda":
        print("mix_variants.py: these are kernels of a GPU, and there is none", file=sys.stderr)
        return 1
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def build(number: int, variant: str) -> Path:
            sources = write_sources(Path(folder) / str(number), constants_of(variant))
            return compile_library(sources, f"mix_variant_{number}", architecture)

        libraries = list(pool.map(build, range(len(args.variants)), args.variants))
        operators = {BUILT_IN: torch.ops.manpp_kernels.scale_bias_mix_backward.default}
        for number, (variant, library) in enumerate(zip(args.variants, libraries, strict=True)):
            operators[variant] = load(library, f"mix_variant_{number}")
        sizes = [LARGE, *(name for name in MAPS if name != LARGE)]
        variants = itertools.product(sizes, (torch.float32, torch.bfloat16), FORMATS, (False, True))
        run_cases((case(operators, Variant(*variant)) for variant in variants), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
