"""``manpp doctor``: what is installed, which backends run here and why others do not, and whether they are right."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

import manpp_kernels
from manpp_kernels import backends, detach_copy, ema_scale_update, scale_bias_mix, use_backend


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        "doctor",
        help="say what is installed, which backends run here, and check each against plain PyTorch",
        description=__doc__,
    )


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0 where every available backend agrees with plain PyTorch, and the one that MANPP_BACKEND names can run; else 1.
    """
    for name, value in versions():
        print(f"{name:<22}{value}")
    print()
    healthy = True
    asked = os.environ.get("MANPP_BACKEND")
    if asked:
        reason = backends.why_not(asked)
        healthy = not reason
        print(f"MANPP_BACKEND asks for {asked}{', which cannot run: ' if reason else ''}{reason}\n")
    for backend in backends.BACKENDS:
        reason = backends.why_not(backend)
        if reason:
            print(f"{backend:<10}not available: {reason}")
            continue
        problems = check(backend)
        healthy = healthy and not problems
        print(f"{backend:<10}{'ok' if not problems else 'WRONG: ' + '; '.join(problems)}")
    return 0 if healthy else 1


def versions() -> list[tuple[str, str]]:
    """What the package runs on."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    rows = [
        ("manpp-kernels", manpp_kernels.__version__),
        ("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})"),
        ("triton", version("triton")),
        ("threads", str(torch.get_num_threads())),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            rows.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"))
    else:
        rows.append(("cuda", "PyTorch sees no device"))
    rows.append(("compiled kernels", _compiled()))
    return rows


def _compiled() -> str:
    if not backends.CPU_COMPILED:
        return "none"
    from manpp_kernels import _C

    architectures = _C.cuda_architectures()
    found = f"cpu, cuda ({architectures})" if architectures else "cpu"
    if not backends.PLANS_COMPILED:
        found += (
            f"; plans (EmaPlan) not for Python {platform.python_version()}, where they use the operators: reinstall"
        )
    return found


def check(backend: str) -> list[str]:
    """What the operators of ``backend`` get wrong against plain PyTorch on the same random tensors; nothing: empty."""
    device = "cuda" if backend == "cuda" or (backend != "cpu" and torch.cuda.is_available()) else "cpu"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    # Sizes around a vector, a block of threads and a chunk, one of them off a 16-byte boundary.
    sizes = (1, 7, 1000, 4097)
    ema, params, bias = ([random(n + 1)[1:] for n in sizes] for _ in range(3))
    a, b, channel_scale = random(2, 5, 7, 3), random(2, 5, 7, 3), random(5)

    def results() -> dict[str, list[torch.Tensor]]:
        scale = torch.tensor([0.7, 1.2], device=device, requires_grad=True)
        average, trained = [e.clone() for e in ema], [x.clone().requires_grad_() for x in bias]
        weights = ema_scale_update(average, params, 0.9, scale=scale, bias=trained, groups=[0, 1, 0, 1])
        weight_gradients = torch.autograd.grad([(w * w).sum() for w in weights], [scale, *trained])
        inputs = [x.clone().requires_grad_() for x in (a, b, channel_scale)]
        mixed = scale_bias_mix(*inputs)
        mix_gradients = torch.autograd.grad((mixed * mixed).sum(), inputs)
        copied = detach_copy(a, dtype=torch.bfloat16, memory_format=torch.channels_last)
        return {
            "ema_scale_update": [*average, *weights],
            "ema_scale_update backward": list(weight_gradients),
            "scale_bias_mix": [mixed],
            "scale_bias_mix backward": list(mix_gradients),
            "detach_copy": [copied],
        }

    try:
        with use_backend(backend):
            found = results()
        with use_backend("eager"):
            expected = results()
    except Exception as error:  # whatever a broken installation raises is what the report is for
        return [f"{type(error).__name__}: {error}"]
    problems = []
    for name, tensors in found.items():
        for x, y in zip(tensors, expected[name], strict=True):
            # The order of additions differs between backends; the sums are of some thousand terms.
            if not torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5):
                problems.append(f"{name} differs by up to {(x.float() - y.float()).abs().max().item():.3g}")
                break
    return problems
