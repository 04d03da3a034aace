"""Every kernel compiled ahead of time, for GPUs that need not be there, and what the machine code says of it.

    python -m manpp_kernels.backends.triton.aot            # a table of all kernels and targets

The tests hold the machine code to its bars by this module (128-bit accesses, no spills), and reports are made from it.
Needs Triton compiling, so ``TRITON_INTERPRET`` must not be set. The NVIDIA tools are those in Triton's own package.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manpp_kernels.backends import triton_interpreted
from manpp_kernels.backends.triton.variants import VARIANTS, Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one variant for one target."""

    variant: str
    target: str
    registers: int  # a thread
    spilled: int  # bytes of stack and local memory a thread (NVIDIA), or registers spilled (AMD)
    shared: int  # bytes a program
    loads: Mapping[int, int]  # instructions that read global memory, by their width in bits
    stores: Mapping[int, int]
    warps: int
    asm: Mapping[str, Any] = field(repr=False)  # each stage's text, and the binary; "sass" for NVIDIA

    @property
    def widest_load(self) -> int:
        return max(self.loads, default=0)

    @property
    def widest_store(self) -> int:
        return max(self.stores, default=0)


def compile_variant(name: str, target: str) -> Facts:
    """Compile ``VARIANTS[name]`` for ``TARGETS[target]`` and read the result."""
    if triton_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it before triton is imported")
    variant = VARIANTS[name]
    compiled = triton.compile(_source(variant), target=TARGETS[target], options=dict(variant.options))
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    registers, spilled, loads, stores, more = read(compiled.asm)
    return Facts(
        variant=name,
        target=target,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        loads=loads,
        stores=stores,
        warps=compiled.metadata.num_warps,
        asm={**compiled.asm, **more},
    )


def compile_pairs(pairs: Sequence[tuple[str, str]], jobs: int = 2) -> dict[tuple[str, str], Facts]:
    """The facts of these pairs of a variant and a target; compiled in ``jobs`` processes."""
    # Spawned, not forked: torch has threads by now.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        facts = pool.map(_compile_pair, pairs, chunksize=4)
        return dict(zip(pairs, facts, strict=True))


def _compile_pair(pair: tuple[str, str]) -> Facts:
    return compile_variant(*pair)


def _source(variant: Variant) -> ASTSource:
    names = variant.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = variant.arguments[name]
        typed = isinstance(value, str)
        signature[name] = value if typed else "constexpr"
        if not typed:
            constants[name] = value
        elif value.startswith("*") and name not in variant.unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)


_Read = tuple[int, int, Counter[int], Counter[int], dict[str, str]]


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(asm: Mapping[str, Any]) -> _Read:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    loads, stores = (_widths(sass, op) for op in ("LDG", "STG"))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), loads, stores, {"sass": sass}


def _widths(sass: str, operation: str) -> Counter[int]:
    """How many of these instructions there are of each width: LDG.E.128 …, and 32 bits where nothing is said."""
    widths: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{operation}((?:\.\w+)*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?!\w)", suffixes)
        widths[int(width.group(1)) if width else 32] += 1
    return widths


_AMD_WIDTHS = {
    "byte": 8,
    "ubyte": 8,
    "short": 16,
    "ushort": 16,
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
}


def _read_amd(asm: Mapping[str, Any]) -> _Read:
    text = asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    def widths(operation: str) -> Counter[int]:
        kinds = re.findall(rf"\b(?:global|buffer|flat)_{operation}_(dwordx\d|[a-z]+)", text)
        return Counter(_AMD_WIDTHS.get(kind, 32) for kind in kinds)

    return (
        number("vgpr_count"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
        widths("load"),
        widths("store"),
        {},
    )


def _shown(widths: Mapping[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "-"


def main() -> int:
    """Print the table."""
    print(f"{'kernel':44}{'target':>8}{'registers':>11}{'spilled':>9}{'shared':>8}  loads; stores (bits)")
    for facts in compile_pairs([(v, t) for v in VARIANTS for t in TARGETS]).values():
        print(
            f"{facts.variant:44}{facts.target:>8}{facts.registers:>11}{facts.spilled:>9}{facts.shared:>8}"
            f"  {_shown(facts.loads)}; {_shown(facts.stores)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
