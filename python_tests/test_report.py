"""manpp train --observe and manpp report: what they say of each block, and that looking changes nothing."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manpp_kernels.cli import main
from manpp_kernels.cli.logs import read_csv
from manpp_kernels.cli.observe import BlockObserver, ema_measures
from manpp_kernels.local.memory import measure_step_memory
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

TINY = ["--model", "resnet20", "--image-size", "8", "--limit", "96", "--test-limit", "32", "--batch-size", "32"]
RUN = ["train", *TINY, "--epochs", "2", "--blocks", "4", "--label-smoothing", "0.1", "--observe"]


def observed(folder: Path, rule: str, options: dict[str, Any] | None = None, **config: Any) -> Any:
    """A trainer of a network of four units, its observer, and three batches of noise from 0 to 1."""
    torch.manual_seed(0)
    observer = BlockObserver(functools.partial(F.cross_entropy, label_smoothing=0.1))
    trainer = LocalTrainer(
        CifarResNet((1, 1, 1), widths=(4, 8, 8)),
        TrainerConfig(rule, options, **config),
        example=(3, 8, 8),
        criterion=observer.criterion,
    )
    observer.attach(trainer, folder)
    batches = [(torch.rand(12, 3, 8, 8), torch.randint(10, (12,))) for _ in range(3)]
    return trainer, observer, batches


def one_epoch(trainer: Any, observer: Any, batches: Any, folder: Path) -> list[dict[str, Any]]:
    trainer.fit(batches, trainer.epoch + 1, val_loader=batches, on_step=observer.step)
    return observer.epoch(trainer, folder)


class TestObserver:
    def test_measures(self, tmp_path: Path) -> None:
        """Against the logits of each head, caught by hooks, and figures by hand."""
        trainer, observer, batches = observed(tmp_path, "man++")
        heads = [block.auxiliary.host.head if block.auxiliary else block.body for block in trainer.network]
        caught: list[list[torch.Tensor]] = [[] for _ in heads]
        losses = torch.zeros(len(heads))
        for head, logits in zip(heads, caught, strict=True):
            head.register_forward_hook(
                lambda _, __, out, logits=logits: logits.append(out) if out.requires_grad else None
            )

        def on_step(trainer: Any, result: Any) -> None:
            losses.add_(torch.stack(result.losses))
            observer.step(trainer, result)

        trainer.fit(batches, 1, val_loader=batches, on_step=on_step)
        rows = observer.epoch(trainer, tmp_path)
        targets = torch.cat([target for _, target in batches])
        for index, (row, logits) in enumerate(zip(rows, caught, strict=True)):
            assert (row["epoch"], row["block"]) == (1, index)
            assert row["accuracy"] == pytest.approx(float((torch.cat(logits).argmax(1) == targets).float().mean()))
            assert row["loss"] == pytest.approx(float(losses[index]) / 3)
        transforms = [block.auxiliary.transform for block in trainer.network if block.auxiliary]
        for row, transform in zip(rows[:-1], transforms, strict=True):
            ema, source = (torch.cat([pair[i].flatten() for pair in transform.pairs()]).detach() for i in (0, 1))
            assert row["scale"] == pytest.approx(transform.scale.item())
            assert row["ema_distance"] == pytest.approx(float((ema - source).norm() / source.norm()), rel=1e-4)
            assert row["ema_similarity"] == pytest.approx(float(F.cosine_similarity(ema, source, 0)), rel=1e-4)
        assert rows[-1]["scale"] is rows[-1]["ema_distance"] is rows[-1]["ema_similarity"] is None
        assert read_csv(tmp_path / "blocks.csv") == observer.rows
        # The next epoch's are of that epoch alone.
        rows = one_epoch(trainer, observer, batches, tmp_path)
        assert rows[-1]["accuracy"] == pytest.approx(trainer.history[1]["train_acc"])
        assert rows[-1]["loss"] == pytest.approx(trainer.history[1]["train_loss"])
        assert trainer.history[0]["train_acc"] != trainer.history[1]["train_acc"]

    def test_memory_of_the_largest_block_is_that_of_a_step(self, tmp_path: Path) -> None:
        trainer, observer, batches = observed(tmp_path, "man++")
        rows = one_epoch(trainer, observer, batches, tmp_path)
        peak = measure_step_memory(trainer, batches[0]).saved_peak
        largest = max(row["memory_bytes"] for row in rows)
        # In a backward pass a little is saved that no forward pass saved, and blocks hand on their features.
        assert largest <= peak <= 1.2 * largest
        assert peak == pytest.approx(trainer.history[0]["peak_memory_bytes"], rel=0.01)

    def test_an_epoch_of_one_step_is_the_trainers_to_measure(self, tmp_path: Path) -> None:
        trainer, observer, batches = observed(tmp_path, "dgl")
        for _ in range(2):
            rows = one_epoch(trainer, observer, batches[:1], tmp_path)
        assert trainer.history[1]["peak_memory_bytes"] > 0
        assert rows[0]["accuracy"] is not None

    @pytest.mark.parametrize(
        ("rule", "options", "config"),
        [
            ("e2e", {}, {}),
            ("predsim", {}, {"accumulate": 3}),
            ("man++", {"form": "parameter"}, {"order": "unlocked"}),
            ("man", {"parts": "lb"}, {}),
            ("mlaan", {}, {}),
            ("infopro", {"loss": "contrastive"}, {}),
        ],
    )
    def test_every_kind_of_rule(
        self, tmp_path: Path, rule: str, options: dict[str, Any], config: dict[str, Any]
    ) -> None:
        trainer, observer, batches = observed(tmp_path, rule, options, **config)
        rows = one_epoch(trainer, observer, batches, tmp_path)
        assert len(rows) == len(trainer.network) == (1 if rule == "e2e" else 4)
        # A contrastive loss asks for no class.
        assert [row["accuracy"] is None for row in rows] == [rule == "infopro"] * (len(rows) - 1) + [False]
        assert rows[-1]["accuracy"] == pytest.approx(trainer.history[0]["train_acc"])
        assert all(row["loss"] > 0 and row["memory_bytes"] > 0 for row in rows)
        assert (rows[0]["scale"] is None) == (rule != "man++")
        assert (rows[0]["ema_distance"] is None) == (rule not in ("man++", "mlaan"))

    def test_nothing_to_measure(self) -> None:
        assert ema_measures([]) == {"scale": None, "ema_distance": None, "ema_similarity": None}


class TestCommands:
    @pytest.fixture(scope="class", name="run")
    @staticmethod
    def _run(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("observed") / "run"
        assert main([*RUN, "--out", str(folder)]) == 0
        return folder

    def test_looking_changes_nothing(self, run: Path, tmp_path: Path) -> None:
        assert main([*RUN, "--no-observe", "--out", str(tmp_path / "run")]) == 0
        first, second = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "run"))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for ours, theirs in zip(read_csv(run / "history.csv"), read_csv(tmp_path / "run" / "history.csv"), strict=True):
            assert ours["peak_memory_bytes"] == theirs["peak_memory_bytes"]

    def test_tensorboard(self, run: Path) -> None:
        events = EventAccumulator(str(run)).Reload()
        rows = read_csv(run / "blocks.csv")
        for name in ("loss", "accuracy", "scale", "ema_distance", "ema_similarity", "memory_bytes"):
            found = [event.value for event in events.Scalars(f"block_{name}/01")]
            assert found == pytest.approx([row[name] for row in rows if row["block"] == 1], rel=1e-5)

    def test_resumed_run_keeps_its_rows(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        text = (folder / "config.yaml").read_text().replace("epochs: 2", "epochs: 3")
        (folder / "config.yaml").write_text(text)
        assert main(["train", "--resume", str(folder)]) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert "the checkpoint's go on for CosineAnnealingLR.T_max 2 (here 3)" in said
        rows = read_csv(folder / "blocks.csv")
        assert [(row["epoch"], row["block"]) for row in rows] == [(e, b) for e in (1, 2, 3) for b in range(4)]
        assert all(math.isfinite(row["accuracy"]) for row in rows)

    def test_report(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["report", str(run)]) == 0
        assert capsys.readouterr().out == f"{run / 'report.png'}\n"
        whole = (run / "report.png").stat().st_size
        (tmp_path / "run").mkdir()
        for name in ("config.yaml", "history.csv"):
            shutil.copy(run / name, tmp_path / "run")
        assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "picture.png")]) == 0
        assert "with --observe, manpp train follows every block" in capsys.readouterr().out
        assert 5000 < (tmp_path / "new" / "picture.png").stat().st_size < whole

    def test_wrong_requests(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def refused(*words: str) -> str:
            assert main(["report", *words]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            return error

        assert "holds no run: there is no config.yaml" in refused(str(tmp_path / "nothing"))
        (tmp_path / "dgl" / "seed-0").mkdir(parents=True)
        shutil.copy(run / "config.yaml", tmp_path / "dgl" / "seed-0")
        assert f"name one of the runs in it, as {tmp_path / 'dgl' / 'seed-0'}" in refused(str(tmp_path))
        assert "no epoch of the run" in refused(str(tmp_path / "dgl" / "seed-0"))
        assert "--out has to end in .png" in refused(str(run), "--out", "report.pdf")
        assert "RUN" in refused()
