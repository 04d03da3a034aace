"""manpp_kernels.cli: options, files, errors, and small real runs on the digits."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from manpp_kernels.cli import bench, main
from manpp_kernels.cli.parsing import Parser, UserError, add_option, option, options_of, parse_config, read_config
from manpp_kernels.cli.recipe import OPTIMIZERS, default_lr, optimizer_factory, scheduler_factory
from manpp_kernels.cli.settings import Settings, from_file
from manpp_kernels.cli.training import build_model
from manpp_kernels.local import adapt, rule_names
from manpp_kernels.models import MODELS
from manpp_kernels.trainer import LocalTrainer, TrainerConfig

PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")


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
            ("--extra a=0.9,1 --extra b=true --extra c=d=e", {"extra": {"a": (0.9, 1), "b": True, "c": "d=e"}}),
        ],
    )
    def test_words(self, parser: Parser, words: str, expected: dict[str, Any]) -> None:
        assert vars(parser.parse_args(words.split())) == expected

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--count 1.5", "has to be a whole number, and is '1.5'"),
            ("--high x", "has to be a number or none"),
            ("--low none", "has to be a number, and is 'none'"),
            ("--high inf", "has to be a finite number, and is inf"),
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
            ("train --model timm/coat_tiny", "no adapter for CoaT"),  # whose blocks run beside each other
            ("train --rule mann", "there is no rule 'mann'; there are"),
            ("train --rule e2e --form parameter", "the rule 'e2e' has no option 'form'"),
            ("train --blocks 99", "can be divided into 1 to 16 local blocks"),
            ("train --optimizer sdg", r"no optimizer 'sdg' \(did you mean sgd\?\)"),
            ("train --optimizer-arg momentun=1", r"SGD has no argument 'momentun' \(did you mean momentum\?\)"),
            ("train --optimizer adam --optimizer-arg betas=2", "Adam does not take these arguments"),
            ("train --schedule cosin", r"is 'cosin' \(did you mean cosine\?\)"),
            ("train --warmup 10 --epochs 10", "has to be shorter than the run"),
            ("train --warmup 3 --epochs 3 --schedule-every step --limit 256", "the warm-up takes 3 of 3 epochs"),
            ("train --optimizer rprop --weight-decay 0", "Rprop has no argument 'weight_decay'"),
            ("train --optimizer adam --optimizer-arg lr=3", "lr has an option of its own: give --lr"),
            ("train --optimizer-arg weight_decay=0", "weight_decay has an option of its own: give --weight-decay"),
            (
                "train --limit 64 --image-size 8 --model timm/convnext_atto",
                r"timm/convnext_atto cannot be made for images of 8x8 \(.*\): choose another --image-size or --model",
            ),
            (
                "train --limit 64 --image-size 40 --model vit_b_16 --rule e2e",
                "vit_b_16 cannot be made for images of 40x40",
            ),
            (
                "train --limit 64 --image-size 40 --model maxvit_t",
                r"maxvit_t cannot be made for images of 40x40 \(.*not divisible.*\): choose another --image-size",
            ),
            ("train --limit 1", "1 training images in batches of 128"),
            ("train --seed 9223372036854775807", "seed has to be below 2\\^40"),
            ("train --lr inf", "--lr: has to be a finite number, and is inf"),
            ("train --limit 64 --image-size 8 --crop 8", "crop is 8, and images of 8x8 can be shifted .* by 7 pixels"),
            ("train --limit 64 --compile inducter", "no backend 'inducter'; there are .*inductor"),
            ("train --clip-norm 0", "clip_norm has to be positive"),
            ("train --cuda-graphs --amp fp16", "cuda_graphs does not go with amp='fp16'"),
            ("train --cuda-graphs --observe", "observe looks into every step"),
            ("train --cuda-graphs --device cpu --limit 64 --image-size 8", "cuda_graphs needs a CUDA device"),
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

    @pytest.mark.parametrize(
        "broken", [AssertionError(), RuntimeError("two\nlines."), torch.OutOfMemoryError("none left")]
    )
    def test_a_network_that_cannot_be_made(
        self, broken: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        def make(num_classes: int) -> Any:
            raise broken

        monkeypatch.setitem(MODELS, "resnet20", make)
        error = refused(capsys, "train", "--model", "resnet20", "--limit", "64", "--image-size", "8")
        reason = " ".join(str(broken).split()).strip(".") or "AssertionError"
        if isinstance(broken, torch.OutOfMemoryError):
            assert "memory does not suffice: try a smaller --batch-size" in error
        else:
            assert f"resnet20 cannot be made for images of 8x8 ({reason}): choose another --image-size" in error

    @pytest.mark.parametrize("broken", [AssertionError("in the loop"), RuntimeError("in the loop")])
    def test_an_error_of_the_training_itself_is_shown_in_full(
        self, broken: Exception, tmp_path: Path, monkeypatch: Any
    ) -> None:
        def step(*_: Any) -> None:
            raise broken

        monkeypatch.setattr(LocalTrainer, "step", step)
        words = ["--model", "resnet20", "--limit", "64", "--image-size", "8", "--no-tensorboard"]
        with pytest.raises(type(broken), match="in the loop"):
            main(["train", *words, "--out", str(tmp_path / "run")])

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
        words = " ".join(text.split())  # an option of this name means one thing to AugLocal, another to MAN and MAN++
        assert re.search(r"auglocal: d, residual blocks .* \[2\]; man, man\+\+: units in front .* \[1\]", words)

    def test_the_page_lists_every_rule(self) -> None:
        listed = re.search(r"^- `--rule`: (.*?);", PAGE, flags=re.MULTILINE)
        assert listed is not None
        assert sorted(re.findall(r"`(.+?)`", listed[1])) == sorted(rule_names())


class TestRecipe:
    def test_optimizers(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        sgd = optimizer_factory("SGD", default_lr("SGD", 1024), 1e-4, {})([parameter])
        assert sgd.defaults["lr"] == pytest.approx(0.8)
        assert sgd.defaults["momentum"] == 0.9
        assert sgd.defaults["nesterov"]
        assert [default_lr(name, 512) for name in ("AdamW", "adam", "rprop")] == [1e-3, 1e-3, None]
        adam = optimizer_factory("adamw", None, 0.1, {"betas": (0.8, 0.9)})([parameter])
        assert adam.defaults["betas"] == (0.8, 0.9)
        # What was given holds, 0 and what is another by default included.
        adam = optimizer_factory("adamw", 0.0, 0.0, {})([parameter])
        assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0, 0)
        assert optimizer_factory("sgd", 0.1, None, {"momentum": 0.5})([parameter]).defaults["momentum"] == 0.5

    @pytest.mark.parametrize("name", sorted(OPTIMIZERS))
    def test_every_optimizer_comes_with_the_arguments_that_it_has(self, name: str, tmp_path: Path) -> None:
        settings = Settings.of({"optimizer": name})
        decay = settings.run.weight_decay
        made = optimizer_factory(name, None, decay, {})([torch.nn.Parameter(torch.zeros(2, 2))])
        assert made.defaults.get("weight_decay") == decay == (None if name == "rprop" else 1e-4)
        # What a run leaves in its folder brings the same back, and gives no weight decay that nobody gave.
        settings.save(tmp_path / "config.yaml")
        assert Settings.of(from_file(tmp_path / "config.yaml")) == settings
        assert Settings.of({"optimizer": name, "weight_decay": 0.5}).run.weight_decay == 0.5

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
        assert rates_of(name, 4, warmup) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        ("epochs", "warmup", "per_epoch", "expected"),
        [
            (1, 0, 1, [1.0]),
            (2, 0, 1, [1.0, 0.01]),
            (3, 0, 1, [1.0, 0.1, 0.01]),
            (3, 2, 1, [1 / 3, 2 / 3, 1.0]),
            (4, 2, 1, [1 / 3, 2 / 3, 1.0, 0.01]),
            (2, 0, 2, [1.0, 1.0, 0.1, 0.01]),
            (2, 1, 1, [0.5, 1.0]),
            (2, 1, 2, [1 / 3, 2 / 3, 1.0, 0.01]),
        ],
    )
    def test_short_runs_in_steps(self, epochs: int, warmup: int, per_epoch: int, expected: list[float]) -> None:
        assert rates_of("step", epochs, warmup, per_epoch) == pytest.approx(expected, abs=1e-6)


def rates_of(name: str, epochs: int, warmup: int, per_epoch: int = 1) -> list[float]:
    """The learning rates of a schedule, from 1 on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_factory(name, epochs, warmup, per_epoch)(optimizer)
    rates = []
    for _ in range(epochs * per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestModels:
    """Positions of vision transformers are those of the images; other networks take any size."""

    @pytest.mark.parametrize(
        ("name", "size"),
        {"vit_b_16": 32, "resnet18": 32, "resnet20": 32, "maxvit_t": 448, "googlenet": 32, "inception_v3": 75}.items(),
    )
    def test_torchvisions(self, name: str, size: int) -> None:
        with torch.device("meta"), warnings.catch_warnings(action="error"):
            model = build_model(name, 7, size)
            assert model(torch.rand(2, 3, size, size)).shape == (2, 7)
        adapt(model)

    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224.augreg_in21k", "deit_tiny_distilled_patch16_224", "resnet18"]
    )
    def test_timms(self, name: str) -> None:
        pytest.importorskip("timm")
        with torch.device("meta"):
            assert build_model(f"timm/{name}", 7, 32)(torch.rand(2, 3, 32, 32)).shape == (2, 7)

    def test_without_a_size_it_is_the_published_one(self) -> None:
        with torch.device("meta"):
            assert build_model("vit_b_32", 7)(torch.rand(2, 3, 224, 224)).shape == (2, 7)


class TestBench:
    @pytest.fixture
    def checkout(self, tmp_path: Path, monkeypatch: Any) -> Path:
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "bench_nothing.py").write_text("def test_pass(benchmark):\n    benchmark(int)\n")
        monkeypatch.setattr(bench, "bench_folder", lambda: tmp_path / "bench")
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # nothing is timed in a worker
        return tmp_path

    def test_runs_and_writes_json(self, checkout: Path) -> None:
        assert main(["bench", "nothing", "--quick", "--json", str(checkout / "out.json")]) == 0
        assert (checkout / "out.json").stat().st_size > 0

    def test_a_place_for_results_that_is_none(self, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (checkout / "file").touch()
        error = refused(capsys, "bench", "nothing", "--json", str(checkout / "file" / "out.json"))
        assert "--json: no results can be written to" in error

    def test_unknown_name(self, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "(did you mean nothing?)" in refused(capsys, "bench", "nothin")

    def test_no_checkout(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
        monkeypatch.setattr("manpp_kernels.__file__", str(tmp_path / "a" / "b" / "__init__.py"))
        monkeypatch.chdir(tmp_path)
        assert "run this in a checkout" in refused(capsys, "bench")


def test_a_configuration_and_a_recipe_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: digits\n")
    message = refused(capsys, "train", "--config", str(path), "--recipe", "e2e/cifar10/resnet32")
    assert "--config and --recipe both say what to train" in message


def test_images_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "only").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / part / "only" / f"{i}.png")
    words = ["--data", f"folder:{tmp_path}", "--model", "resnet20", "--image-size", "8", "--batch-size", "2"]
    assert "images of one class alone" in refused(capsys, "train", *words, "--out", str(tmp_path / "run"))
