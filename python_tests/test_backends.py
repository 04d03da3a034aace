"""Which backend runs: ``use_backend``, ``MANPP_BACKEND``, and an error that says why another cannot."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import manpp_kernels
from manpp_kernels import backends, detach_copy, ema_scale_update, scale_bias_mix, use_backend

RUNNING = [b for b in manpp_kernels.available() if b in ("cpu", "eager")]
MISSING = [b for b in backends.BACKENDS if b not in manpp_kernels.available()]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, since the environment is read once in a process."""
    env = {k: v for k, v in os.environ.items() if k not in ("MANPP_BACKEND", "TRITON_INTERPRET")} | environment
    root = str(Path(manpp_kernels.__file__).parents[1])
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, timeout=120)


def test_eager_is_always_available_and_last() -> None:
    assert manpp_kernels.available()[-1] == "eager"
    assert manpp_kernels.why_not("eager") == ""


def test_the_compiled_library_loads_where_it_was_built() -> None:
    """A library that is there and does not load would silently leave the compiled backends out of these tests."""
    built = importlib.util.find_spec("manpp_kernels._C") is not None
    assert built == backends.CPU_COMPILED, backends.LOAD_ERROR


def test_a_library_that_was_not_built_is_told_from_one_that_does_not_load() -> None:
    hide = (
        "import sys; sys.modules['manpp_kernels._C'] = None; import manpp_kernels; print(manpp_kernels.why_not('cpu'))"
    )
    assert run_python(hide).stdout.startswith("the compiled library was not built; reinstall manpp-kernels")


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("sm_80,sm_90,sm_100,compute_100", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"], ["7.5"]),
        ("sm_80,sm_90", ["8.0", "8.9", "9.0"], ["7.5", "10.0", "12.0"]),
        ("sm_89", ["8.9"], ["8.0", "8.6", "9.0"]),
        ("sm_90a,compute_90a", ["9.0"], ["8.0", "10.0"]),
        ("compute_80", ["8.0", "8.6", "9.0", "12.1"], ["7.5"]),
        ("", [], ["8.0"]),
    ],
)
def test_what_machine_code_runs_on(architectures: str, runs: list[str], does_not: list[str]) -> None:
    for capability, expected in [*((c, True) for c in runs), *((c, False) for c in does_not)]:
        major, minor = map(int, capability.split("."))
        assert backends.runs_on(architectures, (major, minor)) == expected, capability


@pytest.mark.parametrize("backend", MISSING)
def test_why_not_names_the_cause_and_use_backend_repeats_it(backend: str) -> None:
    reason = manpp_kernels.why_not(backend)
    assert reason
    with pytest.raises(RuntimeError) as error, use_backend(backend):
        pass
    assert reason in str(error.value)
    assert repr(backend) in str(error.value)


def test_an_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"use_backend: backend 'cuDNN'.*cuda, triton, cpu, eager"),
        use_backend("cuDNN"),
    ):
        pass
    assert "cuda, triton, cpu, eager" in manpp_kernels.why_not("cuDNN")


@pytest.mark.parametrize("backend", RUNNING)
def test_use_backend_selects_and_restores(backend: str) -> None:
    cpu = torch.device("cpu")
    before = backends.selected(cpu)
    with use_backend(backend):
        assert backends.selected(cpu) == backend
        with use_backend("eager"):
            assert backends.selected(cpu) == "eager"
        assert backends.selected(cpu) == backend
    assert backends.selected(cpu) == before
    with pytest.raises(KeyError), use_backend(backend):
        raise KeyError
    assert backends.selected(cpu) == before, "an exception restores it, too"


def test_the_choice_reaches_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """``eager`` runs the overload of that name, anything else on a CPU the default one, forward and backward."""
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "manpp_kernels":
                seen.append(str(func).removeprefix("manpp_kernels."))
            return func(*args, **(kwargs or {}))

    x, y = torch.ones(4, requires_grad=True), torch.ones(4)
    for backend in RUNNING:
        overload = "eager" if backend == "eager" else "default"
        seen.clear()
        with use_backend(backend), Recorder():
            ema_scale_update(torch.zeros(4), y, 0.5)
            detach_copy(x)
            scale_bias_mix(x, y, torch.ones(())).sum().backward()
        assert seen == [
            f"ema_scale_update.{overload}",
            f"detach_copy.{overload}",
            f"scale_bias_mix.{overload}",
            f"scale_bias_mix_backward.{overload}",
        ]


def test_the_choice_holds_in_other_threads() -> None:
    found = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: found.append(backends.selected(torch.device("cpu"))))
        thread.start()
        thread.join()
    assert found == ["eager"]


def test_whether_it_is_the_compiled_librarys_is_told_alike() -> None:
    x = torch.ones(3)
    for backend in [None, *RUNNING]:
        with contextlib.nullcontext() if backend is None else use_backend(backend):
            assert backends.compiled_for(x) == (backends.selected(x.device) in ("cpu", "cuda"))


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "meta"), ("triton", "cpu")])
def test_devices_that_a_backend_does_not_run_on(monkeypatch: pytest.MonkeyPatch, backend: str, device: str) -> None:
    """On any machine, by what was chosen and could run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_override", backend)
    with pytest.raises(RuntimeError, match=f"'{backend}' was asked for, and the tensors are on {device}"):
        backends.selected(torch.device(device))


def test_tensors_on_another_device_than_the_backend() -> None:
    if "cpu" in RUNNING:
        meta = torch.ones(3, device="meta")
        with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for.*meta"):
            scale_bias_mix(meta, meta, torch.ones((), device="meta"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_defaults_and_errors_on_a_gpu() -> None:
    assert backends.selected(torch.device("cuda")) == manpp_kernels.available()[0]
    x = torch.ones(3, device="cuda")
    for backend in [b for b in manpp_kernels.available() if b == "cpu"]:
        with use_backend(backend), pytest.raises(RuntimeError, match=r"'cpu' was asked for.*cuda"):
            detach_copy(x)
    for backend in [b for b in manpp_kernels.available() if b in ("cuda", "triton")]:
        with use_backend(backend), pytest.raises(RuntimeError, match=f"'{backend}' was asked for.*cpu"):
            detach_copy(x.cpu())


@pytest.mark.parametrize("backend", RUNNING)
def test_environment_variable(backend: str) -> None:
    """It counts before, after and, overruled, within a use_backend block; also where the first call is in one."""
    code = """
import torch
from manpp_kernels import backends, detach_copy, use_backend
def selected():
    detach_copy(torch.ones(3))
    return backends.selected(torch.device("cpu"))
with use_backend("eager"):
    print(selected())
print(selected())
with use_backend("eager"):
    print(selected())
"""
    result = run_python(code, MANPP_BACKEND=backend)
    assert result.stdout.split() == ["eager", backend, "eager"], result.stderr


@pytest.mark.parametrize("backend", ["fastest", *MISSING[:1]])
def test_wrong_environment_fails_at_the_call_and_not_at_import(backend: str) -> None:
    code = """
import torch, manpp_kernels
print("imported")
for _ in range(2):
    try:
        manpp_kernels.detach_copy(torch.ones(3))
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
"""
    result = run_python(code, MANPP_BACKEND=backend)
    kind = "RuntimeError" if backend in backends.BACKENDS else "ValueError"
    expected = f"{kind} MANPP_BACKEND: backend {backend!r} cannot run: {manpp_kernels.why_not(backend)}"
    assert result.stdout.splitlines() == ["imported", expected, expected], result.stderr


def test_import_loads_neither_triton_nor_the_training_half() -> None:
    """Most sessions need neither, and both take seconds to import."""
    code = """
import sys, torch
before = set(sys.modules)
import manpp_kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    result = run_python(code)
    assert "manpp_kernels" in result.stdout, result.stderr
    for name in ("triton", "torchvision", "sklearn", "matplotlib", "timm"):
        assert name not in result.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "channels": (lambda o, x: o.scale_bias_mix(x, x, torch.ones(2), 2.0), "one entry, or one for each channel"),
        "shapes": (lambda o, x: o.scale_bias_mix(x, x.view(8), torch.ones(()), 2.0), "of one shape and dtype"),
        "groups": (
            lambda o, x: o.ema_scale_update([x], [x], 0.5, None, torch.ones(1), [x], [1], 2.0, None, [x.clone()]),
            "group 1 of a scale with 1 entries",
        ),
        "groups, backward": (
            lambda o, x: o.ema_scale_update_backward([x], [x], [x], torch.ones(1), [-1], 2.0, [x.clone()], None),
            "group -1 of a scale with 1 entries",
        ),
    }.values(),
)
def test_compiled_operators_read_nothing_past_the_end_of_scale(call, message: str) -> None:
    """Called directly, as the public functions check before."""
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.manpp_kernels, torch.ones(1, 4, 2))


class _OnGpu:
    """What is asked of a tensor on a second GPU."""

    device, is_cuda = torch.device("cuda", 1), True

    def __init__(self) -> None:
        self.streams: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.streams.append(stream)

    def data_ptr(self) -> int:
        return id(self)


def test_memory_is_kept_for_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a graph is captured is asked of the device that the memory is on, whichever is current."""
    current, capturing = [0], {0: True, 1: False}

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(of.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[current[-1]])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"the stream of {of}")
    kept: dict[int, object] = {}
    monkeypatch.setattr(backends, "_kept_for_graphs", kept)
    t = _OnGpu()
    assert backends.is_capturing(torch.device("cuda", 0))
    assert not backends.is_capturing(torch.device("cpu"))
    backends.keep_while_used(t)
    assert (t.streams, kept) == (["the stream of cuda:1"], {})
    capturing[1] = True
    backends.keep_while_used(t)
    assert (len(t.streams), list(kept.values())) == (1, [t])


def test_a_plan_keeps_its_seed_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(backends, "keep_while_used", kept.append)
    plan = manpp_kernels.EmaPlan(torch.zeros(3, dtype=torch.bfloat16), torch.ones(3), rounding="stochastic")
    plan.update(0.5)
    assert [t.dtype for t in kept] == [torch.int64]
