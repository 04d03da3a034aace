"""Which backend runs: ``use_backend``, ``MANPP_BACKEND``, and an error that says why another cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
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


CALL = "import torch, manpp_kernels as m; y = m.detach_copy(torch.ones(3)); from manpp_kernels import backends; "
SELECTED = "print(backends.selected(torch.device('cpu')))"


@pytest.mark.parametrize("backend", RUNNING)
def test_environment_variable(backend: str) -> None:
    result = run_python(CALL + SELECTED, MANPP_BACKEND=backend)
    assert result.stdout.strip() == backend, result.stderr


def test_use_backend_takes_precedence_over_the_environment() -> None:
    code = "import torch\nfrom manpp_kernels import backends, use_backend\nwith use_backend('eager'): " + SELECTED
    result = run_python(code, MANPP_BACKEND=RUNNING[0])
    assert result.stdout.strip() == "eager", result.stderr


def test_leaving_use_backend_returns_to_the_environment() -> None:
    code = (
        "import torch\nfrom manpp_kernels import backends, use_backend\n"
        f"with use_backend('{RUNNING[0]}'): backends.selected(torch.device('cpu'))\n{SELECTED}"
    )
    result = run_python(code, MANPP_BACKEND="eager")
    assert result.stdout.strip() == "eager", result.stderr


def test_wrong_environment_fails_at_the_first_call_and_not_at_import() -> None:
    result = run_python("import manpp_kernels; print('imported')", MANPP_BACKEND="fastest")
    assert result.stdout.strip() == "imported", result.stderr
    result = run_python(CALL, MANPP_BACKEND="fastest")
    assert "ValueError: MANPP_BACKEND: backend 'fastest' cannot run: there is no backend 'fastest'" in result.stderr
    for backend in MISSING[:1]:
        result = run_python(CALL, MANPP_BACKEND=backend)
        assert f"RuntimeError: MANPP_BACKEND: backend '{backend}' cannot run" in result.stderr


def test_import_loads_neither_triton_nor_the_training_half() -> None:
    """Most sessions need neither, and both take seconds to import."""
    names = ("triton", "torchvision", "sklearn", "matplotlib")
    code = f"import sys, {{}}; print([m for m in {names} if m in sys.modules])"
    assert run_python(code.format("manpp_kernels")).stdout == run_python(code.format("torch")).stdout
