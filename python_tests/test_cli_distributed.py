"""``manpp train --data-parallel``: processes that torchrun starts train one network, and one of them writes."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manpp_kernels.cli import main
from manpp_kernels.cli.parsing import UserError
from manpp_kernels.cli.ranks import Ranks, joined
from manpp_kernels.cli.settings import Settings
from manpp_kernels.data.loading import EpochBatches
from manpp_kernels.trainer import TrainerConfig

RUN = [
    *["train", "--data", "digits", "--model", "resnet20", "--image-size", "8", "--limit", "70", "--test-limit", "33"],
    *["--batch-size", "32", "--crop", "0", "--epochs", "2", "--rule", "dgl", "--blocks", "2", "--threads", "1"],
    *["--no-tensorboard", "--device", "cpu"],
]


def torchrun(*words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, "-m", "manpp_kernels.cli", *words], capture_output=True, text=True, timeout=300, env=environment
    )


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    done = torchrun(*RUN, "--data-parallel", "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert main([*RUN, "--out", str(tmp_path / "one")]) == 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")]
    assert [s["processes"] for s in summaries] == [2, 1]
    # The same batches: what differs are batch normalisations, which see half of one, and the order of sums.
    two, one = (history(tmp_path / name) for name in ("two", "one"))
    assert len(two) == len(one) == 2
    for a, b in zip(two, one, strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=0.2)
        # All images are counted: of the 33 for testing, and of two batches of 32 for training.
        for name, images in {"val_acc": 33, "train_acc": 64}.items():
            right = float(a[name]) * images
            assert right == pytest.approx(round(right), abs=1e-4)
    assert (
        load_file(tmp_path / "two" / "model.safetensors").keys()
        == load_file(tmp_path / "one" / "model.safetensors").keys()
    )
    again = torchrun("train", "--resume", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert history(tmp_path / "two") == two


def test_two_processes_share_the_blocks_out(tmp_path: Path) -> None:
    """The images, their order and the network are those of one process, and so is what comes out, bit for bit."""
    done = torchrun(*RUN, "--pipeline", "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert main([*RUN, "--out", str(tmp_path / "one")]) == 0
    same = ("train_loss", "train_acc", "val_loss", "val_acc", "lr")
    two, one = (history(tmp_path / name) for name in ("two", "one"))
    assert [[row[key] for key in same] for row in two] == [[row[key] for key in same] for row in one]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    assert all(torch.equal(a, weights[1][key]) for key, a in weights[0].items())
    again = torchrun("train", "--resume", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert history(tmp_path / "two") == two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (RUN, "there are 2 processes, each of which would train the same: add --data-parallel or --pipeline"),
        ([*RUN, "--data-parallel", "--batch-size", "33"], "does not come out even over 2 processes"),
        ([*RUN, "--data-parallel", "--batch-size", "128"], "70 training and 33 test images are too few"),
    ],
    ids=["not asked for", "uneven", "few images"],
)
def test_wrong_requests_in_two_processes(words: list[str], message: str, tmp_path: Path) -> None:
    done = torchrun(*words, "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main([*RUN, "--data-parallel", "--out", str(tmp_path / "run")]) == 2
    assert "--data-parallel is for processes that torchrun starts" in capsys.readouterr().err


def test_the_first_process_alone_makes_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Path] = []

    def broadcast(objects: list[Path | None], **_: object) -> None:
        if objects[0] is not None:
            sent.append(objects[0])
        objects[0] = sent[0]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    made = (Path(f"folder-{number}") for number in itertools.count())
    ranks = [Ranks(rank, 3, torch.device("cpu")) for rank in range(3)]
    assert {rank.agree(lambda: next(made)) for rank in ranks} == {Path("folder-0")}
    assert next(made) == Path("folder-1")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="there are 1 GPUs for process 2"),
        joined(TrainerConfig(data_parallel=True), "cuda"),
    ):
        pass


@pytest.mark.parametrize("several", ["data_parallel", "pipeline"])
@pytest.mark.parametrize("other", [{"observe": True}, {"cuda_graphs": True}], ids=str)
def test_what_does_not_go_with_several_processes(several: str, other: dict[str, bool]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(other))}.*{several}|{several}.*{next(iter(other))}"):
        Settings.of({"data": "digits", several: True, **other})


def test_a_comparison_trains_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text("common: {data: digits, data-parallel: true}\nvariants: {a: {rule: dgl}}\n")
    assert main(["compare", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "data-parallel is for manpp train" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, True), (False, False)], ids=["training", "evaluation"])
def test_shares_of_batches(ranks: int, shuffle: bool, drop_last: bool) -> None:
    settings = {"seed": 3, "shuffle": shuffle, "drop_last": drop_last}
    whole = list(EpochBatches(25, 6, **settings))
    shares = [list(EpochBatches(25, 6, share=(rank, ranks), **settings)) for rank in range(ranks)]
    for i, (batch, seed) in enumerate(whole):
        parts = [share[i] for share in shares if i < len(share)]
        assert sorted(torch.cat([indices for indices, _ in parts]).tolist()) == sorted(batch.tolist())
        assert [s - seed for _, s in parts] == list(range(len(parts)))  # augmentation of their own
    if drop_last:
        assert all(len(share) == len(whole) == 4 for share in shares)
        assert {len(indices) for share in shares for indices, _ in share} == {6 // ranks}
