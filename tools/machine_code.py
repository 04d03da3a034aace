"""What the compiler made of every CUDA and Triton kernel, read from the machine code; needs no GPU.

    python tools/machine_code.py                    # writes docs/machine_code.md, for the installed library
    python tools/machine_code.py --check            # exit code 1 where a kernel misses a bar, which it names
    python tools/machine_code.py --library build/_C.abi3.so --triton

The tool that reads it is cuobjdump, from the CUDA toolkit or from Triton's package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = 256  # of a block, in every kernel of csrc/cuda
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # what a multiprocessor holds, the same from compute capability 8.0 to 10.0
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}

# Kernels, or specialisations of them, whose work goes through 16-byte accesses. The others look every element up: any
# mix of dtypes, misaligned tensors, and transpositions (coalesced without).
VECTORISED = re.compile(
    r"^(typed_kernel|cast_kernel|mix_kernel<\w+, (Scalar|Row|Pixel|Each)>|backward_kernel<\w+(<[^>]+>)?, (?!void)|"
    r"backward_rows_kernel<\w+, (?!1>)|backward_pixels_kernel<\w+, (?!1>))"
)
# Between float32 and a type of 2 bytes, four elements at a time: 16 bytes of one, 8 of the other.
MIXED = re.compile(r"^(?=.*\bfloat\b)(?=.*\bb?float16\b)")
MODES = ("Scalar", "Row", "Pixel", "Each", "Any")  # scale_bias_mix.cu: Mode, in its order


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int = 0
    shared: int = 0  # bytes a block
    local: int = 0  # bytes of stack and local memory a thread
    accesses: Counter[tuple[str, int]] = field(default_factory=Counter)  # ("load" | "store", bits) -> instructions
    spills: int = 0  # instructions that touch local memory

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident, blocks being of THREADS threads."""
        warps = THREADS // 32
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // max(registers_of_warp, 1) // 4 * 4 // warps
        by_shared = SHARED.get(self.architecture, min(SHARED.values())) // max(self.shared, 1)
        return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS

    @property
    def missed(self) -> list[str]:
        """The bars that the kernel misses."""
        found = []
        if self.local or self.spills:
            found.append(f"{self.local} bytes of local memory, {self.spills} accesses to it")
        if VECTORISED.match(self.name):
            least = 64 if MIXED.match(self.name) else 128
            for kind in ("load", "store"):
                if not any(self.accesses[kind, bits] for bits in (64, 128) if bits >= least):
                    found.append(f"no {least}-bit {kind}")
        return found


def tool(name: str) -> str:
    """Where one of CUDA's binary utilities is."""
    places = [shutil.which(name), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{name}"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        places.append(f"{triton.submodule_search_locations[0]}/backends/nvidia/bin/{name}")
    for place in places:
        if place and Path(place).exists():
            return place
    raise FileNotFoundError(f"{name} was not found: install the CUDA toolkit, or triton, whose package has it")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled to short readable names."""
    mangled = sorted(set(names))
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return dict(zip(mangled, map(_short, text.splitlines()), strict=True))


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|manpp::cuda::|manpp::|c10::|torch::headeronly::|^void ", "", name)
    name = re.sub(r"\((Mode)\)(\d)", lambda m: MODES[int(m[2])], name)
    name = name.split("(")[0].replace("BFloat16", "bfloat16").replace("Half", "float16")
    # Typed<ema, params, bias> reads better as the three dtypes.
    return re.sub(r"Typed<([^>]*)>", r"\1", name)


def kernels_of(library: Path) -> list[Kernel]:
    """Every kernel in a library, for every architecture in it."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture = function = ""
    for line in run(tool("cuobjdump"), "-res-usage", str(library)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[architecture, function] = Kernel(function, architecture, registers, shared, stack + local)
    for line in run(tool("cuobjdump"), "-sass", str(library)).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match[1]
        elif match := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?((?:LDG?|STG?|LDL|STL)(?:\.\w+)*)\s", line):
            kernel = found[architecture, function]
            operation, *suffixes = match[1].split(".")
            if operation in ("LDL", "STL"):
                kernel.spills += 1
            else:  # LD and ST are of generic addresses: global ones that the compiler could not tell
                widths = [int(s.lstrip("US")) for s in suffixes if s.lstrip("US") in ("8", "16", "64", "128")]
                kernel.accesses["load" if operation.startswith("LD") else "store", widths[-1] if widths else 32] += 1
    names = demangled(function for _, function in found)
    for kernel in found.values():
        kernel.name = names[kernel.name]
    return sorted(found.values(), key=lambda k: (int(re.sub(r"\D", "", k.architecture)), k.name))


def shown(kernel: Kernel, kind: str) -> str:
    widths = sorted(((bits, n) for (k, bits), n in kernel.accesses.items() if k == kind), reverse=True)
    return ", ".join(f"{n} x {bits}" for bits, n in widths) or "none"


def report(kernels: list[Kernel], triton: bool) -> str:
    """The page."""
    lines = [
        "# Machine code",
        "",
        "Written by `tools/machine_code.py`; every table is read from the compiled kernels, and needs no GPU. Accesses",
        "are instructions to global memory by their width in bits, counted once wherever they stand in the code, so",
        "that a kernel's edge cases (the last elements of a tensor, misaligned ones) count beside its main path.",
        f"Occupancy is the share of a multiprocessor's {WARPS} warps that can be resident, for blocks of {THREADS} "
        "threads.",
        "",
        "Bars, held by `tools/machine_code.py --check` in the tests: no kernel uses local memory or spills a register;",
        "every kernel marked * loads and stores 128 bits at a time, or 64 where it goes between float32 and 16 bits.",
    ]
    for architecture in dict.fromkeys(k.architecture for k in kernels):
        own = [k for k in kernels if k.architecture == architecture]
        lines += ["", f"## CUDA, {architecture}", ""]
        lines += [f"{len(own)} kernels, {sum(bool(k.missed) for k in own)} of which miss a bar.", ""]
        lines += ["| kernel | registers | shared | local | occupancy | loads | stores |"]
        lines += ["| --- | --: | --: | --: | --: | --- | --- |"]
        for k in own:
            star = " *" if VECTORISED.match(k.name) else ""
            lines.append(
                f"| `{k.name}`{star} | {k.registers} | {k.shared} | {k.local} | {k.occupancy:.0%} "
                f"| {shown(k, 'load')} | {shown(k, 'store')} |"
            )
    return "\n".join(lines + (triton_tables() if triton else [])) + "\n"


def triton_tables() -> list[str]:
    """The Triton kernels, compiled ahead of time."""
    from manpp_kernels.backends.triton import aot

    lines = []
    targets = [t for t in aot.TARGETS if t.startswith("sm_")]
    facts = aot.compile_pairs([(variant, target) for target in targets for variant in aot.VARIANTS])
    for target in targets:
        lines += ["", f"## Triton, {target}", "", "| kernel | registers | shared | local | loads | stores |"]
        lines += ["| --- | --: | --: | --: | --- | --- |"]
        for f in (f for (_, t), f in facts.items() if t == target):
            loads, stores = (
                ", ".join(f"{n} x {bits}" for bits, n in sorted(w.items(), reverse=True)) or "none"
                for w in (f.loads, f.stores)
            )
            lines.append(f"| `{f.variant}` | {f.registers} | {f.shared} | {f.spilled} | {loads} | {stores} |")
    return lines


def installed() -> Path:
    """The compiled library of this checkout, which is read and not loaded."""
    return ROOT / "manpp_kernels" / "_C.abi3.so"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=installed(), help="a library built with CUDA")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "machine_code.md", help="the page to write")
    parser.add_argument("--check", action="store_true", help="write nothing; name the kernels that miss a bar")
    parser.add_argument("--triton", action="store_true", help="also compile the Triton kernels, and list them")
    options = parser.parse_args()
    kernels = kernels_of(options.library)
    if not kernels:
        print(f"{options.library} has no CUDA kernels: build it with MANPP_CUDA=on", file=sys.stderr)
        return 1
    missed = [f"{k.architecture} {k.name}: {'; '.join(k.missed)}" for k in kernels if k.missed]
    if not options.check:
        options.output.write_text(report(kernels, options.triton), encoding="utf-8")
    print("\n".join(missed) or f"{len(kernels)} kernels, none of which misses a bar")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
