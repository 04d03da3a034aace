"""manpp compare: the file it takes, what it does not do again, and its table; small real runs on the digits."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from manpp_kernels.cli import compare, comparison, comparison_times, main
from manpp_kernels.cli.logs import write_csv
from manpp_kernels.cli.parsing import UserError
from manpp_kernels.cli.settings import Settings
from manpp_kernels.trainer import LocalTrainer

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "data": "digits",
    "model": "resnet20",
    "image-size": 8,
    "limit": 64,
    "test-limit": 32,
    "batch-size": 32,
    "epochs": 2,
    "tensorboard": False,
    "observe": True,
}
VARIANTS: dict[str, Any] = {
    "e2e": {"rule": "e2e"},
    "dgl | narrow": {"rule": "dgl", "blocks": 3, "seeds": [0]},
    "man++/dgl": {"rule": "man++", "blocks": 3},
}


def config(folder: Path, **changes: Any) -> Path:
    content = {"title": "Tiny", "seeds": [0, 1], "common": COMMON, "variants": VARIANTS, **changes}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of standard error of a request that is refused."""
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


class TestFile:
    def test_seed_by_seed(self, tmp_path: Path) -> None:
        comparison = compare.read(config(tmp_path))
        assert [(variant.name, seed) for variant, seed, _ in comparison.runs()] == [
            ("e2e", 0),
            ("dgl | narrow", 0),
            ("man++/dgl", 0),
            ("e2e", 1),
            ("man++/dgl", 1),
        ]
        assert all(settings.run.seed == seed and settings.run.epochs == 2 for _, seed, settings in comparison.runs())

    def test_command_line_wins(self, tmp_path: Path) -> None:
        comparison = compare.read(config(tmp_path), {"epochs": 7})
        assert {settings.run.epochs for _, _, settings in comparison.runs()} == {7}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"variant": {}}, r"no key 'variant' \(did you mean variants\?\)"),
            ({"variants": {}}, "has to name one variant or more"),
            ({"variants": {"a": {"rule": "dlg"}}}, "variant 'a': there is no rule 'dlg'"),
            (
                {"variants": {"a": {"rule": "dgl", "form": "parameter"}}},
                "variant 'a': the rule 'dgl' has no option 'form'",
            ),
            ({"variants": {"a": {"rlue": "dgl"}}}, "variant 'a': there is no option 'rlue'"),
            ({"variants": {"a": 3}}, "variant 'a' has to hold keys and values, and is 3"),
            ({"variants": {"a": {"out": "x"}}}, "out is set by the comparison; use --out"),
            ({"common": {"seed": 3}}, "seed is set by the comparison; use seeds"),
            ({"variants": {"a b": {}, "A-b": {}}}, "'a b' and 'A-b' would share a folder"),
            ({"seeds": []}, "seeds has to be whole numbers"),
            ({"seeds": [1, 1]}, "each once"),
            ({"variants": {"a": {"seeds": [True]}}}, "variant 'a': seeds has to be whole numbers"),
        ],
    )
    def test_errors(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            compare.read(config(tmp_path, **changes))

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "bench" / "comparisons").glob("*.yaml")), ids=lambda path: path.stem
    )
    def test_those_of_the_checkout(self, path: Path) -> None:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))["variants"]
        assert [variant.name for variant in compare.read(path).variants] == list(written)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file and the folder of a comparison that has been made."""
    folder = tmp_path_factory.mktemp("compare")
    path = config(folder)
    assert main(["compare", "--config", str(path), "--out", str(folder / "out")]) == 0
    return path, folder / "out"


class TestCommand:
    def test_a_folder_that_is_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert main(["compare", "--config", str(config(tmp_path)), "--out", str(tmp_path / "file")]) == 2
        assert "error: --out: no comparison can be written to" in capsys.readouterr().err

    def test_files(self, done: tuple[Path, Path]) -> None:
        _, out = done
        results = json.loads((out / "comparison.json").read_text())
        assert (results["runs_done"], results["runs_wanted"]) == (5, 5)
        assert results["shared"] | {"images": 64, "test_images": 32, "epochs": 2} == results["shared"]
        assert {"commit", "torch", "cpu", "device", "version"} <= set(results["environment"])
        end_to_end, dgl, man = results["variants"]
        assert (end_to_end["blocks"], end_to_end["auxiliary_parameters"], end_to_end["ema_parameters"]) == (1, 0, 0)
        assert dgl["accuracy_std"] is None
        assert dgl["auxiliary_parameters"] > 0
        assert man["ema_parameters"] > 0
        found = [run["accuracy"] for run in man["runs"]]
        assert man["accuracy"] == pytest.approx(sum(found) / 2)
        assert man["accuracy_std"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5, abs=1e-6)
        assert [run["seed"] for run in man["runs"]] == [0, 1]
        assert [len(run["epochs"]) for run in man["runs"]] == [2, 2]
        assert [(row["epoch"], row["block"]) for row in man["runs"][1]["last_epoch_by_block"]] == [
            (2, 0),
            (2, 1),
            (2, 2),
        ]
        with (out / "comparison.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 5
        assert all(float(row["seconds_per_step"]) > 0 and int(row["peak_memory_bytes"]) > 0 for row in rows)
        assert (out / "comparison.png").stat().st_size > 5000
        assert (out / "curves.png").stat().st_size > 5000

    def test_table_says_what_it_is_of(self, done: tuple[Path, Path]) -> None:
        text = (done[1] / "comparison.md").read_text()
        for fact in ("Tiny", "resnet20, 272,474 parameters", "64 training and 32 test images at 8x8", "2 epochs"):
            assert fact in text
        for fact in ("seeds 0, 1", "learning rate 0.025", f"torch {torch.__version__}", "commit", "5 of 5 runs"):
            assert fact in text
        assert "| dgl \\| narrow | 3 | 1 |" in text
        assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1

    def test_done_runs_are_not_repeated(self, done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        path, out = done

        def step(*_: Any) -> None:
            raise AssertionError("trained again")

        monkeypatch.setattr(LocalTrainer, "step", step)
        assert main(["compare", "--config", str(path), "--out", str(out)]) == 0

    @pytest.mark.usefixtures("undrawn")
    def test_steps_timed_in_turns_take_the_place_of_what_runs_took(
        self, done: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, out = done[0], tmp_path / "copy"
        shutil.copytree(done[1], out)
        assert main(["compare", "--config", str(path), "--out", str(out), "--time", "2"]) == 0
        times = json.loads((out / "step_times.json").read_text())
        assert times["rounds"] == 2
        assert list(times["variants"]) == list(VARIANTS)
        before, after = (json.loads((folder / "comparison.json").read_text()) for folder in (done[1], out))
        for old, new in zip(before["variants"], after["variants"], strict=True):
            assert new["seconds_per_step"] == times["variants"][new["name"]]["seconds"] != old["seconds_per_step"]
            assert new["runs"] == old["runs"]
        assert "the median over epochs and seeds" in (done[1] / "comparison.md").read_text()
        assert "the median of 2 that all variants took in turns" in (out / "comparison.md").read_text()
        # As many steps of one variant take their place among the others; another number of them does not go with those.
        for rounds, kept in (("2", list(VARIANTS)), ("1", ["e2e"])):
            words = ["--time", rounds, "--only", "e2e"]
            assert main(["compare", "--config", str(path), "--out", str(out), *words]) == 0
            assert list(json.loads((out / "step_times.json").read_text())["variants"]) == kept

    @pytest.mark.usefixtures("undrawn")
    def test_steps_timed_otherwise_are_left_out_of_the_table(self, done: tuple[Path, Path], tmp_path: Path) -> None:
        path, out = done[0], tmp_path / "copy"
        words = ["compare", "--config", str(path), "--out", str(out)]
        assert main([*words, "--time", "1", "--batch-size", "16", "--only", "e2e", "--only", "man++/dgl"]) == 0
        times = json.loads((out / "step_times.json").read_text())
        assert list(times["variants"]) == ["e2e", "man++/dgl"]
        assert times["variants"]["e2e"]["settings"]["batch-size"] == 16
        # As if one of them had been timed with the runs' own settings, and then on another device.
        shutil.copytree(done[1], out, dirs_exist_ok=True)
        times["variants"]["man++/dgl"]["settings"]["batch-size"] = 32
        (out / "step_times.json").write_text(json.dumps(times))
        assert main([*words, "--table"]) == 0
        before, after = (json.loads((folder / "comparison.json").read_text()) for folder in (done[1], out))
        old, new = ([v["seconds_per_step"] for v in results["variants"]] for results in (before, after))
        assert new == [*old[:2], times["variants"]["man++/dgl"]["seconds"]]
        text = (out / "comparison.md").read_text()
        assert "the median of 1 taken in turns; of e2e, dgl | narrow the median over epochs and seeds" in text
        assert "(left out: e2e, timed with batch-size 16, and now it is 32)" in text
        times["variants"]["man++/dgl"]["machine"]["threads"] = 99
        (out / "step_times.json").write_text(json.dumps(times))
        assert main([*words, "--table"]) == 0
        text = (out / "comparison.md").read_text()
        assert "Step time: the median over epochs and seeds (left out: " in text
        assert "man++/dgl, timed with threads 99, and its runs had" in text

    @pytest.mark.usefixtures("undrawn")
    def test_a_file_of_many_epochs_is_tried_with_one(self, tmp_path: Path) -> None:
        path = config(tmp_path, common={**COMMON, "schedule": "step"}, variants={"e2e": {"rule": "e2e"}}, seeds=[0])
        assert main(["compare", "--config", str(path), "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
        with (tmp_path / "out" / "e2e" / "seed-0" / "history.csv").open() as file:
            assert [float(row["lr"]) for row in csv.DictReader(file)] == [0.025]

    @pytest.mark.usefixtures("undrawn")
    def test_threads_of_a_variant_are_its_own(self, tmp_path: Path) -> None:
        before, out = torch.get_num_threads(), tmp_path / "out"
        variants = {"more": {"rule": "e2e", "threads": before + 1}, "usual": {"rule": "e2e"}}
        path = config(tmp_path, common={**COMMON, "epochs": 1}, variants=variants, seeds=[0])
        words = ["compare", "--config", str(path), "--out", str(out)]
        assert main(words) == 0
        assert main([*words, "--time", "1"]) == 0
        times = json.loads((out / "step_times.json").read_text())["variants"]
        for name, threads in (("more", before + 1), ("usual", before)):
            summary = json.loads((out / name / "seed-0" / "summary.json").read_text())
            assert summary["environment"]["threads"] == times[name]["machine"]["threads"] == threads
        assert torch.get_num_threads() == before

    @pytest.mark.usefixtures("undrawn")
    def test_folders_of_before_say_where_they_are(self, done: tuple[Path, Path], tmp_path: Path) -> None:
        """Settings once named their folder; a comparison with such runs in it is still the same one."""
        path, out = done[0], tmp_path / "copy"
        shutil.copytree(done[1], out)
        for saved in out.glob("*/*/config.yaml"):
            saved.write_text(f"{saved.read_text()}out: somewhere\n")
        assert main(["compare", "--config", str(path), "--out", str(out), "--table"]) == 0

    def test_other_settings_are_refused(self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        path, out = done
        error = refused(capsys, "--config", str(path), "--out", str(out), "--epochs", "3")
        assert "holds a run with epochs 2, and now it is 3: choose another --out" in error

    def test_stops_and_continues_exactly(
        self,
        done: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """A time limit in the middle of an epoch; the weights at the end are those of a run without one."""
        path, before = done
        words = ["compare", "--config", str(path), "--out", str(tmp_path), "--only", "man++/dgl", "--device", "cpu"]
        taken = 0

        def late_after_three_steps() -> float:
            return 0.0 if taken < 3 else 1e9

        step = LocalTrainer.step

        def counted(*given: Any) -> Any:
            nonlocal taken
            taken += 1
            return step(*given)

        with monkeypatch.context() as patch:
            patch.setattr(compare, "monotonic", late_after_three_steps)
            patch.setattr(LocalTrainer, "step", counted)
            assert main([*words, "--time-limit", "60"]) == 0
        output = capsys.readouterr()
        assert "the time is over; run the same command again to continue" in output.err
        assert "no run is finished yet" in output.out
        assert taken == 3
        assert main(words) == 0
        assert "| e2e |  | 0 of 2 | not done |" in capsys.readouterr().out
        for seed in (0, 1):
            name = f"man++-dgl/seed-{seed}/model.safetensors"
            first, second = load_file(before / name), load_file(tmp_path / name)
            assert all(torch.equal(first[key], second[key]) for key in first)

    def test_a_run_that_cannot_be_done_leaves_the_others(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        variants = {"too many": {"rule": "dgl", "blocks": 99}, "e2e": {"rule": "e2e"}}
        path = config(tmp_path, variants=variants, seeds=[0])
        assert main(["compare", "--config", str(path), "--out", str(tmp_path / "out"), "--epochs", "1"]) == 2
        output = capsys.readouterr()
        assert "1 of 2 runs could not be done; the first, too many with seed 0: " in output.err
        assert "1 of 2 runs done" in output.out

    def test_wrong_requests(self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        path = str(done[0])
        assert "no variant 'e2' (did you mean e2e?)" in refused(capsys, "--config", path, "--only", "e2")
        assert "positive number of minutes" in refused(capsys, "--config", path, "--time-limit", "0")
        assert "positive number of steps" in refused(capsys, "--config", path, "--time", "0")
        assert "cannot be read" in refused(capsys, "--config", "no.yaml")
        assert "--config" in refused(capsys)


class TestPage:
    @pytest.fixture
    def page(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(ROOT / "bench"))
        return importlib.import_module("comparison_page")

    def test_agrees_with_the_results(self, page: Any) -> None:
        assert page.main(["--check"]) == 0

    def test_shows_what_the_command_printed(
        self, page: Any, done: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results, docs = tmp_path / "bench" / "results" / "cpu", tmp_path / "docs"
        results.mkdir(parents=True)
        docs.mkdir()
        shutil.copy(done[1] / "comparison.json", results / "comparison_tiny.json")
        (docs / "comparison.md").write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
        monkeypatch.setattr(page, "ROOT", tmp_path)
        monkeypatch.setattr(page, "PAGE", docs / "comparison.md")
        monkeypatch.setattr(page, "RESULTS", results.parent)
        assert page.main(["--check"]) == 1
        assert page.main([]) == 0
        assert page.main(["--check"]) == 0
        text = (docs / "comparison.md").read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert (done[1] / "comparison.md").read_text().strip() in text
        assert re.search(
            r"\| training accuracy by block, % \| 0 \| 1 \| 2 \|\n.*\n\| e2e \| [0-9.]+ \|  \|  \|\n", text
        )
        for name in re.findall(r"\((figures/.*?)\)", text):
            assert (docs / name).is_file()


def test_a_machine_of_any_run_may_be_another() -> None:
    settings = Settings.of({"data": "digits"})
    machine = {"device": "cpu", "cpu": "that", "threads": 1}
    timed = {"machine": machine, "settings": {k: v for k, v in settings.content().items() if k != "seed"}}
    assert comparison_times.unlike(timed, settings, [machine, machine]) is None
    found = comparison_times.unlike(timed, settings, [machine, {**machine, "threads": 2}])
    assert found == "threads 1, and its runs had 2"


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    rows = [
        {"epoch": i + 1, "val_acc": a, "train_acc": a, "seconds": t, "seconds_per_step": t, "peak_memory_bytes": m}
        | {"train_loss": 1.0, "val_loss": 1.0, "memory": "measured"}
        for i, (a, t, m) in enumerate([(0.5, 9.0, 10), (0.9, 1.0, 30), (0.7, 2.0, 20)])
    ]
    write_csv(rows, tmp_path / "history.csv")
    run = comparison._run(0, {"blocks": 3, "auxiliary_parameters": 1, "ema_parameters": 2}, tmp_path)
    names = ("accuracy", "train_accuracy", "seconds", "seconds_per_step", "peak_memory_bytes")
    assert [run[name] for name in names] == [0.7, 0.7, 12.0, 2.0, 30]
