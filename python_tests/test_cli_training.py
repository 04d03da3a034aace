"""``manpp train``, ``demo`` and ``--resume``: small real runs on the digits."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_cli import refused

import manpp_kernels.cli.train
from manpp_kernels.cli import main
from manpp_kernels.cli.settings import Settings
from manpp_kernels.cli.train import new_folder
from manpp_kernels.models import resnet20
from manpp_kernels.trainer import LocalTrainer

# Less than a second an epoch.
TINY = ["--model", "resnet20", "--image-size", "8", "--limit", "64", "--test-limit", "32", "--batch-size", "32"]
FOUR_EPOCHS = ["train", *TINY, "--epochs", "4", "--blocks", "4"]


class _Stop(Exception):
    """Ends a training that has shown what a test wants to see."""


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
        assert "out" not in config
        assert config["model"] == "resnet20"
        assert config["blocks"] == 4

    def test_tensorboard(self, finished: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(finished))
        events.Reload()
        tags = events.Tags()["scalars"]
        assert {"train_loss", "val_acc", "lr", "block_loss/00", "block_loss/03"} <= set(tags)
        assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]

    @pytest.mark.usefixtures("undrawn")
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

    @pytest.mark.usefixtures("undrawn")
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
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
        assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]

    def test_a_schedule_that_moves_with_every_step(self, tmp_path: Path) -> None:
        """The rate of the last of two steps an epoch, of four: from 0.1 to 0."""
        words = "--epochs 2 --rule e2e --lr 0.1 --schedule linear --schedule-every step --no-tensorboard"
        assert main(["train", *TINY, *words.split(), "--out", str(tmp_path)]) == 0
        with (tmp_path / "history.csv").open() as file:
            assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([0.05, 0.0])

    def test_the_seed_is_that_of_weights_and_of_the_order_of_the_images(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def seen(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            first: list[tuple[torch.Tensor, torch.Tensor]] = []

            def step(self: LocalTrainer, batch: Any) -> None:
                first.append((next(self.model.parameters()).detach().clone(), batch[0]))
                raise _Stop

            monkeypatch.setattr(LocalTrainer, "step", step)
            words = ["--crop", "0", "--rule", "e2e", "--no-tensorboard", "--seed", str(seed)]
            torch.manual_seed(torch.seed())  # whatever was drawn before
            with pytest.raises(_Stop):
                main(["train", *TINY, *words, "--out", str(tmp_path / str(len(list(tmp_path.iterdir()))))])
            return first[0]

        zero, again, one = seen(0), seen(0), seen(1)
        for a, b, c in zip(zero, again, one, strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)

    def test_what_resume_refuses(self, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "--lr would change it" in refused(capsys, "train", "--resume", str(finished), "--lr", "3")
        assert "holds a run already" in refused(capsys, "train", "--out", str(finished))
        file = finished / "summary.json"
        for out in (file, file / "a" / "b"):
            assert f"{file} is a file, and --out needs a folder" in refused(capsys, "train", "--out", str(out))
        other = ["--resume", str(finished), "--out", str(tmp_path)]
        assert "--out would change it" in refused(capsys, "train", *other)
        (tmp_path / "checkpoint.pt").touch()
        assert "holds no run" in refused(capsys, "train", "--resume", str(tmp_path))

    @pytest.mark.usefixtures("undrawn")
    def test_runs_of_the_same_moment_have_folders_of_their_own(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(manpp_kernels.cli.train, "datetime", OneMoment)
        words = ["train", *TINY, "--epochs", "1", "--rule", "e2e", "--no-tensorboard"]
        for _ in range(3):
            assert main(words) == 0
        first = "digits-resnet20-e2e-20260101-120000"
        assert sorted(os.listdir("runs")) == [first, f"{first}-2", f"{first}-3"]
        # The settings name no folder: the same run again has one of its own, too.
        assert main(["train", "--config", f"runs/{first}/config.yaml"]) == 0
        assert (tmp_path / "runs" / f"{first}-4" / "summary.json").is_file()
        # What is taken is not known before the folder is made, and nothing is made for what is refused.
        settings = Settings.of({"rule": "e2e", "model": "timm/test_vit"})
        places = [new_folder(settings) for _ in range(2)]
        assert len(os.listdir("runs")) == 4
        names = [place().name for place in places if not isinstance(place, Path)]
        assert names == ["digits-timm-test_vit-e2e-20260101-120000", "digits-timm-test_vit-e2e-20260101-120000-2"]

    @pytest.mark.usefixtures("undrawn")
    def test_a_run_that_died_before_its_first_checkpoint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        def step(*_: Any) -> None:
            raise RuntimeError("died")

        folder = tmp_path / "run"
        words = ["train", *TINY, "--epochs", "1", "--rule", "e2e", "--out", str(folder)]
        with monkeypatch.context() as patch:
            patch.setattr(LocalTrainer, "step", step)
            with pytest.raises(RuntimeError, match="died"):
                main(words)
        assert (folder / "config.yaml").is_file()
        error = refused(capsys, "train", "--resume", str(folder))
        hint = f"--config {folder / 'config.yaml'} --out {folder}"
        assert f"there is no checkpoint {folder / 'checkpoint.pt'}: start the run again with {hint}" in error
        assert main(["train", *hint.split()]) == 0
        # Now there is something to lose; without its checkpoint, too.
        assert "holds a run already: continue it with manpp train --resume" in refused(capsys, *words)
        (folder / "checkpoint.pt").unlink()
        assert "holds a finished run, whose checkpoint is gone: choose another" in refused(capsys, *words)
        (folder / "summary.json").unlink()
        assert main(words) == 0

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        error = refused(capsys, "train", *TINY, "--rule", "e2e", "--out", str(tmp_path / "file" / "run"))
        assert str(tmp_path / "file") in error

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
            "--optimizer rprop --rule e2e --no-tensorboard",
        ],
    )
    def test_rules_and_options(self, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", *TINY, "--epochs", "1", "--out", str(tmp_path / "run"), *words.split()]) == 0
        assert "epoch 1/1" in capsys.readouterr().out

    def test_images_that_the_rule_cannot_use_are_the_users(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Which only the first step shows."""
        words = [*TINY, "--epochs", "1", "--rule", "infopro", "--mean", "0.5,0.5,0.5", "--out", str(tmp_path / "run")]
        assert "the decoder needs images with values between 0 and 1" in refused(capsys, "train", *words)

    def test_a_loss_that_is_no_number_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--rule", "e2e", "--epochs", "1", "--lr", "1e30", "--no-tensorboard", "--out", str(tmp_path / "run")]
        assert main(["train", *TINY, *words]) == 0
        assert "the loss is not a number" in capsys.readouterr().out

    def test_the_rule_is_told_what_the_images_are_normalised_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def step(self: LocalTrainer, batch: Any) -> None:
            decoder = self.network.blocks[0].auxiliary.decoder
            images = batch[0] * decoder.std + decoder.mean
            assert (images.min().item(), images.max().item()) == pytest.approx((0, 1), abs=1e-5)
            raise _Stop

        monkeypatch.setattr(LocalTrainer, "step", step)
        with pytest.raises(_Stop):
            main(["train", *TINY, "--rule", "infopro", "--no-tensorboard", "--out", str(tmp_path / "run")])

    @pytest.mark.usefixtures("undrawn")
    def test_a_vision_transformer_is_made_for_the_size_of_the_images(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        words = "--model timm/vit_tiny_patch16_224 --image-size 32 --rule e2e --limit 4 --batch-size 4 --epochs 1"
        assert main(["train", *TINY, *words.split(), "--no-tensorboard", "--out", str(tmp_path / "run")]) == 0

    def test_demo(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--epochs", "1", "--image-size", "8", "--limit", "128", "--test-limit", "32", "--out", str(tmp_path)]
        assert main(["demo", *words]) == 0
        assert (tmp_path / "curves.png").is_file()
        table = capsys.readouterr().out
        assert "e2e" in table
        assert "man++" in table
        assert "holds a run already" in refused(capsys, "demo", *words)

    @pytest.mark.usefixtures("undrawn")
    def test_demos_of_the_same_moment_have_folders_of_their_own(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(manpp_kernels.cli.train, "datetime", OneMoment)
        words = ["--epochs", "1", "--image-size", "8", "--limit", "64", "--test-limit", "32"]
        for _ in range(2):
            assert main(["demo", *words]) == 0
        for name in ("demo-20260101-120000", "demo-20260101-120000-2"):
            assert sorted(os.listdir(tmp_path / "runs" / name)) == ["curves.png", "e2e", "man++"]


class OneMoment(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> OneMoment:
        return cls(2026, 1, 1, 12)


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
