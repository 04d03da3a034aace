"""The benchmarks run, and their pages agree with the results that are kept."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from manpp_kernels.models import resnet20
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"


QUICK = {"MANPP_BENCH_QUICK": "1", "MANPP_BENCH_DEVICE": "cpu"}


@pytest.fixture
def bench(monkeypatch):
    """Imports a benchmark of the folder, in its quick form."""
    for key, value in QUICK.items():
        monkeypatch.setenv(key, value)
    monkeypatch.syspath_prepend(str(BENCH))
    # One thread: among other tests, threads that wait for each other would measure the waiting.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)


def run_quickly(path: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The JSON and the output of a benchmark in a process of its own, in its quick form."""
    done = subprocess.run(
        [sys.executable, *words, "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, **QUICK, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text()), done.stdout


def test_operator_benchmarks_give_rows_with_floors_and_peers(tmp_path):
    results, _ = run_quickly(tmp_path / "rows.json", "-m", "manpp_kernels.cli", "bench", "--quick")
    assert set(results) == {"environment", "floors", "rows"}
    assert results["floors"]["copy_gbytes_per_second"]
    assert {row["operator"] for row in results["rows"]} == {"ema_scale_update", "scale_bias_mix", "detach_copy"}
    for row in results["rows"]:
        assert row["us"] > 0
        assert row["again_us"] > 0
        assert row["floor_us"] > 0
        assert not row["left_out"]
        assert row["headline"] in row["contenders"]
        assert any(not c["ours"] for c in row["contenders"].values())


def test_an_interrupted_benchmark_leaves_its_rows_so_far(tmp_path):
    path = tmp_path / "rows.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "manpp_kernels.cli", "bench", "--quick", "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, **QUICK, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of its processes hear of the interrupt, as from a terminal
    )
    begin = time.monotonic()
    while not path.exists() and process.poll() is None and time.monotonic() - begin < 120:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out[-3000:]
    rows = json.loads(path.read_text())["rows"]
    assert {row["operator"] for row in rows} == {"detach_copy"}  # the first
    assert "rows: medians in microseconds" in out
    assert list(tmp_path.iterdir()) == [path]


def test_host_cost(bench, tmp_path, capsys):
    path = tmp_path / "host.json"
    assert bench("host_cost").main(["--json", str(path)]) == 0
    assert "foreach lerp_" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {(r["work"], r["tensors"]) for r in rows} == {
        (work, count) for work in ("update", "update + weights") for count in (10, 100, 1000)
    }


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_variants_of_the_ema_kernel_compile(bench, tmp_path):
    variants = bench("ema_variants")
    library = variants.compile_library(tmp_path, "sm_90")
    for name, _ in variants.VARIANTS.values():
        assert hasattr(ctypes.CDLL(str(library)), name)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_variants_of_the_mix_compile(bench, tmp_path):
    variants = bench("mix_variants")
    sources = variants.write_sources(tmp_path / "some", variants.constants_of("kTeam=8,kPixelFlight=1"))
    assert "kTeam = 8;" in (sources / "cuda/reduce.cuh").read_text()
    library = variants.compile_library(sources, "mix_variant_of_a_test", "sm_90")
    assert "scale_bias_mix_backward(Tensor grad" in str(variants.load(library, "mix_variant_of_a_test")._schema)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mix_variant_of_a_test::scale_bias_mix_backward", "CUDA")
    with pytest.raises(ValueError, match="define the constant kNone 0 times"):
        variants.write_sources(tmp_path / "none", {"kNone": 1})
    for usual in variants.USUAL:
        variants.write_sources(tmp_path / usual, variants.constants_of(usual))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_what_measures_launches_by_their_parameters_compiles(tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-o", str(tmp_path / "parameter_sizes")]
    subprocess.run([*command, str(BENCH / "parameter_sizes.cu")], check=True)


def test_pieces_of_a_variant_cover_every_element(bench):
    variants = bench("ema_variants")
    inputs = bench("ema_contenders").make_inputs([(1000,), (0,), (512,), (3,)], variants.FP32, 1)
    rows = variants.pieces(inputs, 512).tolist()
    ema, params = inputs.ema, inputs.params
    assert rows == [
        [ema[0].data_ptr(), params[0].data_ptr(), 512],
        [ema[0].data_ptr() + 2048, params[0].data_ptr() + 2048, 488],
        [ema[2].data_ptr(), params[2].data_ptr(), 512],
        [ema[3].data_ptr(), params[3].data_ptr(), 3],
    ]


def test_counters_watch_cases_that_there_are(tmp_path):
    code = "import manpp_kernels; manpp_kernels.available = lambda: ['cuda', 'eager']; import counters; "
    code += "print(sum(counters.find(work).moved > 0 for work in counters.WORKS) == len(counters.WORKS))"
    environment = {**os.environ, "MANPP_BENCH_DEVICE": "cuda", "PYTHONPATH": f"{BENCH}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_counters_are_read_by_kernel_and_work(bench):
    counters = bench("counters")
    head = '"ID","Process ID","Process Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected to process 7", head]
    for number, name in enumerate(("spin_kernel", "typed_kernel", "spin_kernel", "lerp", "mul")):
        for metric in counters.METRICS:
            value = f"{1 + number},000.5" if metric == "gpu__time_duration.sum" else str(10 * number)
            lines.append(f'"{number}","7","python","{name}","Command line profiler metrics","{metric}","u","{value}"')
    found = counters.parse("\n".join(lines))
    assert [[kernel["kernel"] for kernel in kernels] for kernels in found] == [["typed_kernel"], ["lerp", "mul"]]
    assert found[0][0]["nanoseconds"] == 2000.5
    assert found[1][1]["memory_percent"] == 40
    row = {"work": "update", "size": "2", "dtypes": "fp32", "contender": "foreach", "bytes_needed": 4e6}
    shown = counters.counted({**row, "kernels": found[1]})
    assert shown == ["update, 2, fp32: foreach", "2", "9.0", "4", "0", "36%", "36%", "36%", "36%"]


def test_training(bench, tmp_path, capsys):
    path = tmp_path / "training.json"
    assert bench("training").main(["--json", str(path)]) == 0
    out = capsys.readouterr().out
    rows = {r["variant"]: r for r in json.loads(path.read_text())["rows"]}
    assert list(rows) == [name for name in bench("training").VARIANTS if "compiled" not in name]
    assert all(re.search(rf": {re.escape(variant)} +\d", out) for variant in rows)
    assert rows["e2e"]["memory_share"] == 1.0
    assert rows["e2e, checkpointed"]["saved_bytes"] < rows["e2e"]["saved_bytes"]
    assert rows["MAN++ activation form"]["saved_bytes"] < rows["MAN++, plain PyTorch"]["saved_bytes"]
    assert rows["MAN++ parameter form"]["saved_bytes"] < rows["MAN++ activation form"]["saved_bytes"]


def test_a_variant_of_training_that_cannot_be_made_costs_the_others_nothing(bench, tmp_path, monkeypatch, capsys):
    training, path = bench("training"), tmp_path / "training.json"

    def fails(model):
        raise RuntimeError("no such kernel\nand so on")

    variants = {"broken": fails, "late": training.VARIANTS["e2e"], "e2e": training.VARIANTS["e2e"]}
    monkeypatch.setattr(training, "VARIANTS", variants)
    assert training.main(["--rounds", "1", "--json", str(path)]) == 1
    assert "broken: left out (RuntimeError: no such kernel)" in capsys.readouterr().err
    content = json.loads(path.read_text())
    assert [r["variant"] for r in content["rows"]] == ["late", "e2e"]
    assert content["left_out"] == {"resnet20, broken": "RuntimeError: no such kernel"}

    assert training.main(["--variant", "late", "--prepare", "-1", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["rows"] == []
    assert "came after 0 s" in content["left_out"]["resnet20, late"]


def test_training_in_several_processes(tmp_path):
    results, out = run_quickly(tmp_path / "processes.json", str(BENCH / "processes.py"))
    rows = {(r["variant"], r["how"]): r for r in results["rows"]}
    assert len(rows) == out.count("resnet20, ") == 9
    assert {r["processes"] for r in rows.values()} == {1, min(4, max(2, os.cpu_count() or 1))}
    e2e = rows["e2e", "one process"]["saved_bytes"]
    assert rows["e2e", "data parallel"]["saved_bytes"] < 0.6 * e2e
    assert rows["e2e", "pipeline of backpropagation"]["saved_bytes"] < e2e
    assert rows["dgl, narrow head, 4 blocks", "pipeline"]["saved_bytes"] < 0.5 * e2e


def test_segmentation_and_detection(bench, tmp_path, monkeypatch, capsys):
    dense, path = bench("dense"), tmp_path / "dense.json"
    names = ("e2e", "dgl, narrow head, checkpointed")
    monkeypatch.setattr(dense, "VARIANTS", {name: dense.VARIANTS[name] for name in names})
    assert dense.main(["--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [r["variant"] for r in rows] == [*names, *names]
    assert [r["memory_share"] < 0.5 for r in rows] == [False, True, False, True]
    out = capsys.readouterr().out
    assert out.count("segmentation, FCN") == out.count("detection, RetinaNet") == 2


def test_plain_man_pp_takes_the_step_of_the_trainer(bench):
    """What our speed is compared with has to compute the same."""
    plain_man_pp = bench("eager_man_pp").EagerManPlusPlus
    torch.set_default_dtype(torch.float64)
    try:
        batch = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        model, twin = resnet20(), resnet20()
        twin.load_state_dict(model.state_dict())
        config = TrainerConfig(rule_options={"lb_init": "copy"}, learning_rate=0.1)
        trainer = LocalTrainer(model, config, example=(3, 8, 8))
        plain = plain_man_pp(twin, (3, 8, 8), 10)
        for ours, theirs in zip(trainer.network, plain.blocks, strict=False):
            heads = zip(theirs.head.parameters(), ours.auxiliary.host.head.parameters(), strict=True)
            for p, q in heads:
                p.data = q.data.clone()
        for _ in range(2):
            trainer.step(batch)
            plain.step(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(trainer.network, plain.blocks, strict=False):
        for p, q in zip(ours.auxiliary.transform.ema.parameters(), theirs.ema.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_pages_agree_with_the_results(bench):
    assert bench("report").main(["--check"]) == 0


def test_report_of_every_kind_of_result(bench, tmp_path):
    """A page, goals and a short table of results made up for the purpose, with and without a GPU."""
    report = bench("report")
    environment = {
        "date": "d",
        "commit": "c",
        "device": "cpu",
        "cpu": "CPU",
        "cores": 2,
        "threads": 2,
        "load": 0.0,
        "python": "3",
        "torch": "2",
    }
    row = {
        "work": "update",
        "size": "96 x 4,800",
        "dtypes": "fp32",
        "mode": "eager",
        "threads": 2,
        "resident": False,
        "us": 10.0,
        "again_us": 11.0,
        "floor_us": 5.0,
        "bytes": 1 << 27,
        "contenders": {"cpu plan": {"us": 10.0, "ours": True}, "foreach lerp_": {"us": 15.0, "ours": False}},
        "left_out": {},
    }
    floors = {"copy_gbytes_per_second": {"2": 50.0}}
    results = {"ema_scale_update": {"environment": environment, "floors": floors, "rows": [row]}}
    page = report.page_block({"machine": results})
    assert "| update, 96 x 4,800, fp32 | 2 thr. | 10.0 | 10% | 5.00 | 50% | foreach lerp_, 15.0 | 1.50x |" in page
    assert "| 1.50x | ≥ 2.00x | missed by 25% |" in page
    assert "1.5x" in report.readme_block({"machine": results})
    later = {"ema_scale_update": {**results["ema_scale_update"], "environment": {**environment, "cpu": "a later one"}}}
    later["ema_scale_update"]["environment"]["date"] = "e"
    for machines in ({"a": results, "b": later}, {"a": later, "b": results}):
        assert report.readme_block(machines) == report.readme_block({"b": later})
    fuller = {"ema_scale_update": {**results["ema_scale_update"], "rows": [row, {**row, "dtypes": "bf16"}]}}
    for machines in ({"a": fuller, "b": later}, {"a": later, "b": fuller}):
        assert report.readme_block(machines) == report.readme_block({"a": fuller})

    gpu = {**environment, "device": "cuda", "gpu": "GPU", "driver": "1", "cuda": "13"}
    floors = {"copy_gbytes_per_second": {"2": 4000.0}, "launch_us": {"eager": 2.0, "graph": 1.0}}
    captured = {**row, "mode": "graph", "us": 5.0}
    results = {"ema_scale_update": {"environment": gpu, "floors": floors, "rows": [row, captured]}}
    counts = {"nanoseconds": 4e3, "bytes_read": 2e6, "bytes_written": 1e6, "memory_percent": 80, "l2_percent": 85}
    kernel = {"kernel": "k", **counts, "multiprocessor_percent": 7, "occupancy_percent": 50}
    counted = {**row, "contender": "cuda plan", "bytes_needed": 3e6, "kernels": [kernel]}
    page = report.page_block({"machine": {**results, "counters": {"environment": gpu, "rows": [counted]}}})
    assert "## GPU" in page
    assert "| update, 96 x 4,800, fp32: of its floor's speed | 50% | ≥ 95% | missed by 47% |" in page
    assert "| update, 96 x 4,800, fp32, captured: of its floor's speed | 100% | ≥ 95% | met |" in page
    assert "| update, 96 x 4,800, fp32: cuda plan | 1 | 4.0 | 3 | 3 | 80% | 85% | 7% | 50% |" in page
    readme = report.readme_block({"machine": results})
    assert "| EMA update, 96 x 4,800, captured | 5.00 µs | foreach lerp_: 15.0 µs | 3.0x |" in readme
    (tmp_path / "ema_scale_update.json").write_text(json.dumps(results["ema_scale_update"]))
    assert "missed: update" in report.summary(tmp_path)


def test_work_that_cannot_be_captured_has_its_eager_row_alone(bench, monkeypatch):
    common, timing = bench("common"), bench("timing")
    monkeypatch.setattr(common, "MODES", (common.EAGER, common.GRAPH))
    monkeypatch.setattr(common, "CLOCKS", {common.EAGER: timing.HostClock, common.GRAPH: timing.HostClock})
    case = next(case for case in bench("bench_scale_bias_mix").cases() if case.work == "backward")
    rows, _ = common.run_case(case)
    assert [row.mode for row in rows] == [common.EAGER]


def test_gpu_script_is_sound_bash():
    for name in ("gpu.sh", "cpu.sh"):
        subprocess.run(["bash", "-n", str(BENCH / name)], check=True)
