"""manpp_kernels.cli: options, files, errors, and small real runs on the digits."""

from __future__ import annotations

import csv
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from manpp_kernels.cli import bench, main
from manpp_kernels.cli.parsing import Parser, UserError, add_option, option, options_of, parse_config, read_config
from manpp_kernels.cli.recipe import default_lr, optimizer_factory, scheduler_factory
from manpp_kernels.cli.settings import Settings, from_file
from manpp_kernels.models import resnet20
from manpp_kernels.trainer import TrainerConfig

# Less than a second an epoch.
TINY = ["--model", "resnet20", "--image-size", "8", "--limit", "64", "--test-limit", "32", "--batch-size", "32"]
FOUR_EPOCHS = ["train", *TINY, "--epochs", "4", "--blocks", "4"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of standard error of a request that is refused."""
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@dataclass(frozen=True)
class Config:
    """A dataclass of options.

    Attributes:
        count: how many,
            in words.
        low, high: two ends.
    """

    count: int = 3
    low: float = 0.5
    high: float | None = None
    blocks: int | tuple[int | str, ...] | None = None
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    extra: dict[str, Any] = option({}, "pairs")  # noqa: RUF009 (it makes a field)
    size: int = option(1, "a size", minimum=1)


class TestOptions:
    @pytest.fixture
    def parser(self) -> Parser:
        parser = Parser(add_help=False)
        for spec in options_of(Config):
            add_option(parser, spec)
        return parser

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("", {}),
            ("--count 4 --low 1e-3", {"count": 4, "low": 1e-3}),
            ("--high none", {"high": None}),
            ("--blocks 16", {"blocks": 16}),
            ("--blocks 3,5", {"blocks": (3, 5)}),
            ("--blocks 3,", {"blocks": (3,)}),
            ("--blocks layer1.4", {"blocks": ("layer1.4",)}),
            ("--blocks 2,layer1.4", {"blocks": (2, "layer1.4")}),
            ("--mode slow --flag", {"mode": "slow", "flag": True}),
            ("--no-flag", {"flag": False}),
            (
                "--extra a=0.9,0.95 --extra b=true --extra c=word",
                {"extra": {"a": (0.9, 0.95), "b": True, "c": "word"}},
            ),
        ],
    )
    def test_words(self, parser: Parser, words: str, expected: dict[str, Any]) -> None:
        assert vars(parser.parse_args(words.split())) == expected

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--count 1.5", "has to be a whole number, and is '1.5'"),
            ("--high x", "has to be a number or none"),
            ("--mode slwo", r"fast or slow, and is 'slwo' \(did you mean slow\?\)"),
            ("--size 0", "has to be 1 or more, and is 0"),
            ("--low", "expected one argument"),
            ("--extra a", "has to be NAME=VALUE"),
            ("--coun 3", "unrecognized arguments: --coun"),
        ],
    )
    def test_wrong_words(self, parser: Parser, words: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            parser.parse_args(words.split())

    def test_descriptions_come_from_the_docstring(self) -> None:
        texts = {spec.name: spec.text for spec in options_of(Config)}
        assert texts["count"] == "how many, in words. [3]"
        assert texts["low"] == "two ends. [0.5]"
        assert texts["high"] == "two ends."

    def test_a_file_gives_what_the_words_give(self, parser: Parser, tmp_path: Path) -> None:
        content: dict[str, Any] = {
            "count": 4,
            "low": "1e-3",  # how YAML 1.1 reads a number without a point
            "blocks": [5],
            "flag": False,
            "extra": {"a": 0.5},
            "high": None,
        }
        expected = {"count": 4, "low": 1e-3, "blocks": (5,), "flag": False, "extra": {"a": 0.5}, "high": None}
        assert vars(parse_config(content, parser, tmp_path)) == expected


class TestConfigFiles:
    def test_yaml_and_toml(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("epochs: 3\nlr: 1e-2\nblocks: [layer1.0, layer2.1]\nflip: true\n")
        expected = {"epochs": 3, "lr": 0.01, "blocks": ("layer1.0", "layer2.1"), "flip": True}
        assert from_file(tmp_path / "a.yaml") == expected
        if sys.version_info >= (3, 11):
            (tmp_path / "a.toml").write_text(
                'epochs = 3\nlr = 1e-2\nblocks = ["layer1.0", "layer2.1"]\nflip = true\nbatch_size = 64\n'
            )
            assert from_file(tmp_path / "a.toml") == {**expected, "batch_size": 64}

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.yaml", "epoch: 3\n", r"a\.yaml: there is no option 'epoch' \(did you mean epochs"),
            ("a.yaml", "epochs: many\n", r"a\.yaml: argument --epochs: has to be a whole number, and is 'many'"),
            ("a.yaml", "epochs: [\n", r"a\.yaml is not valid YAML"),
            ("a.yaml", "- 3\n", "has to hold keys and values"),
            ("a.toml", "epochs = \n", r"a\.toml is not valid TOML"),
            ("a.json", "{}", r"has to end in \.yaml, \.yml, \.toml"),
        ],
    )
    def test_errors(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        if name.endswith("toml"):
            pytest.importorskip("tomllib")
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            from_file(tmp_path / name)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot be read"):
            read_config(tmp_path / "none.yaml")

    def test_saved_settings_come_back(self, tmp_path: Path) -> None:
        given = {
            "epochs": 7,
            "optimizer": "adamw",
            "optimizer_arg": {"betas": (0.9, 0.95)},
            "rule": "man++",
            "form": "parameter",
            "momentum": 0.9,
            "blocks": (5,),
            "schedule": "step",
            "schedule_every": "step",
            "flip": False,
            "data_root": Path("somewhere"),
        }
        settings = Settings.of(given)
        settings.save(tmp_path / "config.yaml")
        assert Settings.of(from_file(tmp_path / "config.yaml")) == settings
        assert settings.trainer.schedule == "step"
        assert settings.trainer.rule_options == {"form": "parameter", "momentum": 0.9}

    def test_defaults_are_the_trainers(self) -> None:
        assert Settings.of({}).trainer == TrainerConfig()


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("trian", r"there is no command 'trian' \(did you mean train\?\)"),
            ("train --epoch 3", r"there is no option --epoch \(did you mean --epochs"),
            ("train --learning-rate=3", "there is no option --learning-rate"),
            ("train --epochs 0", "--epochs: has to be 1 or more, and is 0"),
            ("train --batch-size x", "--batch-size: has to be a whole number"),
            ("train --data digts", "no set of images 'digts'"),
            (
                "train --data folder:nowhere",
                "there is no folder nowhere: give one with a folder of images for each class",
            ),
            ("train --data cifar10 --data-root nowhere", "cifar10 is not in nowhere"),
            ("train --model resnet33", r"no model 'resnet33' \(did you mean"),
            ("train --model vgg11", "no adapter for VGG"),
            ("train --rule mann", "there is no rule 'mann'; there are"),
            ("train --rule e2e --form parameter", "the rule 'e2e' has no option 'form'"),
            ("train --blocks 99", "can be divided into 1 to 16 local blocks"),
            ("train --optimizer sdg", r"no optimizer 'sdg' \(did you mean sgd\?\)"),
            ("train --optimizer-arg momentun=1", r"SGD has no argument 'momentun' \(did you mean momentum\?\)"),
            ("train --optimizer adam --optimizer-arg betas=2", "Adam does not take these arguments"),
            ("train --schedule cosin", r"is 'cosin' \(did you mean cosine\?\)"),
            ("train --warmup 10 --epochs 10", "has to be shorter than the run"),
            ("train --limit 1", "1 training images in batches of 128"),
            ("train --lr inf", "--lr: has to be a finite number, and is inf"),
            ("train --limit 64 --image-size 8 --crop 8", "crop is 8, and images of 8x8 can be shifted .* by 7 pixels"),
            ("train --limit 64 --compile inducter", r"no backend 'inducter' \(did you mean inductor"),
            ("train --clip-norm 0", "clip_norm has to be positive"),
            ("train --resume nowhere", "there is no checkpoint nowhere"),
            ("train --resume x --config y.yaml", "leave out --config"),
            ("train --config nowhere.yaml", "cannot be read"),
        ],
    )
    def test_one_sentence_and_exit_code_2(
        self, words: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        error = refused(capsys, *words.split())
        assert error.startswith("manpp")
        assert re.search(message, error), error
        assert not list(tmp_path.iterdir()), "a refused request leaves nothing behind"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "sees no CUDA device" in refused(capsys, "train", "--device", "cuda")

    def test_a_missing_package(self, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        def missing(name: str) -> Any:
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

        monkeypatch.setattr(importlib, "import_module", missing)
        assert "needs torchvision: pip install 'manpp-kernels[train]'" in refused(capsys, "train")

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--help"])
        text = capsys.readouterr().out
        assert all(f"--{name.replace('_', '-')}" in text for name in Settings.of({}).values())


class TestRecipe:
    def test_optimizers(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        sgd = optimizer_factory("SGD", default_lr("SGD", 1024), 1e-4, {})([parameter])
        assert sgd.defaults["lr"] == pytest.approx(0.8)
        assert sgd.defaults["momentum"] == 0.9
        assert sgd.defaults["nesterov"]
        adam = optimizer_factory("adamw", None, 0.1, {"betas": (0.8, 0.9)})([parameter])
        assert adam.defaults["betas"] == (0.8, 0.9)

    @pytest.mark.parametrize(
        ("name", "warmup", "expected"),
        [
            ("cosine", 0, [1.0, 0.853553, 0.5, 0.146447]),
            ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
            ("step", 0, [1.0, 1.0, 0.1, 0.01]),
            ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
            ("linear", 2, [1 / 3, 2 / 3, 1.0, 0.5]),
        ],
    )
    def test_schedules(self, name: str, warmup: int, expected: list[float]) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = scheduler_factory(name, 4, warmup)(optimizer)
        rates = []
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs without interruption."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*FOUR_EPOCHS, "--out", str(folder)]) == 0
    return folder


class TestTraining:
    def test_files(self, finished: Path) -> None:
        with (finished / "history.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
        assert all(float(row["train_loss"]) > 0 and 0 <= float(row["val_acc"]) <= 1 for row in rows)
        assert all(int(row["peak_memory_bytes"]) > 0 for row in rows)

        with Image.open(finished / "curves.png") as image:
            assert image.format == "PNG"
            assert image.width > 500

        model = resnet20(10)
        model.load_state_dict(load_file(finished / "model.safetensors"))

        config = yaml.safe_load((finished / "config.yaml").read_text())
        assert config["model"] == "resnet20"
        assert config["blocks"] == 4

    def test_tensorboard(self, finished: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(finished))
        events.Reload()
        tags = events.Tags()["scalars"]
        assert {"train_loss", "val_acc", "lr", "block_loss/00", "block_loss/03"} <= set(tags)
        assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]

    def test_a_run_repeats_from_its_config(self, finished: Path, tmp_path: Path) -> None:
        again = tmp_path / "again"
        assert main(["train", "--config", str(finished / "config.yaml"), "--out", str(again)]) == 0
        first, second = (load_file(folder / "model.safetensors") for folder in (finished, again))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_interrupted_and_resumed_is_the_same_run(self, finished: Path, tmp_path: Path) -> None:
        """Ctrl-C in a process of its own, somewhere in the middle, and the rest of the run in another."""
        folder = tmp_path / "run"
        code, error = interrupt_after_first_epoch([*FOUR_EPOCHS, "--out", str(folder)], folder)
        assert code == 130, error
        assert f"manpp train --resume {folder}" in error
        assert "Traceback" not in error
        assert (folder / "checkpoint.pt").is_file()

        assert main(["train", "--resume", str(folder), "--threads", str(torch.get_num_threads())]) == 0
        first, second = (load_file(run / "model.safetensors") for run in (finished, folder))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_resume_in_the_middle_of_an_epoch(self, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
        from manpp_kernels.cli.display import Display

        steps = 0

        def step(self: Display, trainer: Any, result: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:  # the first of two in the second epoch
                os.kill(os.getpid(), signal.SIGINT)

        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(Display, "step", step)
            assert main([*FOUR_EPOCHS, "--out", str(folder)]) == 130
        assert steps == 3
        assert main(["train", "--resume", str(folder / "checkpoint.pt")]) == 0
        first, second = (load_file(run / "model.safetensors") for run in (finished, folder))
        assert all(torch.equal(first[name], second[name]) for name in first)
        with (folder / "history.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]

    def test_what_resume_refuses(self, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "--lr would change it" in refused(capsys, "train", "--resume", str(finished), "--lr", "3")
        assert "holds a run already" in refused(capsys, "train", "--out", str(finished))
        (tmp_path / "checkpoint.pt").touch()
        assert "holds no run" in refused(capsys, "train", "--resume", str(tmp_path))

    def test_a_damaged_checkpoint(self, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
        (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:1000])
        assert "checkpoint.pt is damaged" in refused(capsys, "train", "--resume", str(tmp_path))

    @pytest.mark.parametrize(
        "words",
        [
            "--rule e2e --optimizer adamw --schedule constant",
            "--rule dgl --blocks layer1.2,layer2.2 --order unlocked --clip-norm 1",
            "--form parameter --total 1 --momentum 0.9 --host-options width=narrow --accumulate 2 --amp bf16",
            "--model resnet18 --image-size 32 --blocks 2 --limit 8 --batch-size 4 --no-tensorboard",
        ],
    )
    def test_rules_and_options(self, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", *TINY, "--epochs", "1", "--out", str(tmp_path / "run"), *words.split()]) == 0
        assert "epoch 1/1" in capsys.readouterr().out

    def test_demo(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--epochs", "1", "--image-size", "8", "--limit", "128", "--test-limit", "32", "--out", str(tmp_path)]
        assert main(["demo", *words]) == 0
        assert (tmp_path / "curves.png").is_file()
        table = capsys.readouterr().out
        assert "e2e" in table
        assert "man++" in table


def interrupt_after_first_epoch(words: list[str], folder: Path) -> tuple[int, str]:
    """Run ``manpp`` in a process, send it SIGINT once it has finished an epoch; its exit code and standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "manpp_kernels.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 60
    while not (folder / "history.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


class TestBench:
    @pytest.fixture
    def checkout(self, tmp_path: Path, monkeypatch: Any) -> Path:
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "bench_nothing.py").write_text("def test_pass(benchmark):\n    benchmark(int)\n")
        monkeypatch.setattr(bench, "bench_folder", lambda: tmp_path / "bench")
        return tmp_path

    def test_runs_and_writes_json(self, checkout: Path) -> None:
        assert main(["bench", "nothing", "--quick", "--json", str(checkout / "out.json")]) == 0
        assert (checkout / "out.json").stat().st_size > 0

    def test_unknown_name(self, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "(did you mean nothing?)" in refused(capsys, "bench", "nothin")

    def test_no_checkout(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        monkeypatch.setattr("manpp_kernels.__file__", str(tmp_path / "a" / "b" / "__init__.py"))
        monkeypatch.chdir(tmp_path)
        assert "run this in a checkout" in refused(capsys, "bench")
