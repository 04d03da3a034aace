"""Blocks on streams of their own: on a stand-in for CUDA's streams who waits for whom, on a GPU the values."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_taps import Skipping
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manpp_kernels import use_backend
from manpp_kernels.cli.parsing import UserError
from manpp_kernels.cli.settings import Settings
from manpp_kernels.models import CifarResNet
from manpp_kernels.trainer import LocalTrainer, TrainerConfig
from manpp_kernels.training.step import StepResult
from manpp_kernels.training.streams import Streams

CASES: dict[str, dict[str, Any]] = {
    "dgl": {"rule": "dgl"},
    "dgl, unlocked": {"rule": "dgl", "order": "unlocked"},
    "predsim": {"rule": "predsim"},
    "infopro": {"rule": "infopro"},
    "man": {"rule": "man"},
    "man++": {"rule": "man++"},
    "man++, unlocked": {"rule": "man++", "order": "unlocked"},
    "man++, parameter form": {"rule": "man++", "rule_options": {"form": "parameter"}},
    "man++, parameter form, unlocked": {"rule": "man++", "rule_options": {"form": "parameter"}, "order": "unlocked"},
    "auglocal": {"rule": "auglocal"},
    "auglocal, unlocked": {"rule": "auglocal", "order": "unlocked"},
    "man++, stages": {"rule": "man++", "rule_options": {"units": "stages"}},
    "compiled": {"rule": "dgl", "blocks": 3, "compile": "aot_eager"},
    "recomputed": {"rule": "dgl", "blocks": 3, "recompute": True},
    "accumulated, clipped": {"rule": "man++", "accumulate": 2, "clip_norm": 0.5},
    "accumulated, clipped, unlocked": {"rule": "man++", "accumulate": 2, "clip_norm": 0.5, "order": "unlocked"},
}
Clock = dict[int, int]


class Stream:
    """A stream as what has to be done before its next kernel: of every stream up to which."""

    current: Stream

    def __init__(self, device: object = None) -> None:
        self.clock: Clock = {}

    def launch(self) -> int:
        self.clock[id(self)] = self.clock.get(id(self), 0) + 1
        return self.clock[id(self)]

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        self._wait(event)

    def _wait(self, event: Clock) -> None:
        self.clock = {s: max(self.clock.get(s, 0), event.get(s, 0)) for s in {*self.clock, *event}}

    def wait_stream(self, other: Stream) -> None:
        self._wait(other.clock)


@contextlib.contextmanager
def current(stream: Stream) -> Iterator[None]:
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class Races(TorchDispatchMode):
    """Finds uses of memory that no wait keeps apart, and memory that would go back too early."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._kept: list[Any] = []  # so that no address is used again
        self._makers: dict[int, Stream] = {}
        self._abroad: dict[Stream, dict[Stream, int]] = {}
        self._written: dict[int, tuple[Stream, int]] = {}
        self._read: dict[int, dict[Stream, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes: set[int] = set()
        for i, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                writes |= {self._key(t) for t in tree_leaves(value) if isinstance(t, Tensor)}
        if str(func).startswith("aten.native_batch_norm.") and args[5]:  # whose schema does not say so
            writes |= {self._key(t) for t in args[3:5] if isinstance(t, Tensor)}
        reads = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)} - writes
        out = func(*args, **kwargs)
        made = {self._key(t) for t in tree_leaves(out) if isinstance(t, Tensor)} - reads - writes
        if made or writes or not tree_leaves(out):  # else a view, which nothing has to be launched for
            self._launch(str(func), reads, writes | made, made)
        return out

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        return storage._cdata

    def _launch(self, name: str, reads: set[int], writes: set[int], made: set[int]) -> None:
        stream = Stream.current
        for key in made:
            self._makers.setdefault(key, stream)
        tick = stream.launch()
        if any(stream.clock.get(id(other), 0) < when for other, when in self._abroad.get(stream, {}).items()):
            self.found.append(f"memory of its own used elsewhere meanwhile: {name}")
        for key in reads | writes:
            others = [self._written[key]] if key in self._written else []
            if key in writes:
                others += self._read.pop(key, {}).items()
            if any(stream.clock.get(id(other), 0) < when for other, when in others):
                self.found.append(f"race: {name}")
            # What a stream allocated comes back to it, and it may use that for anything next.
            if stream is not self._makers.get(key, stream):
                self._abroad.setdefault(self._makers[key], {})[stream] = tick
            if key in writes:
                self._written[key] = stream, tick
            else:
                self._read.setdefault(key, {})[stream] = tick


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Races]:
    """Streams on the CPU, each operator a kernel on the current one."""
    Stream.current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    races = Races()
    with use_backend("eager"):  # the others write by addresses
        yield races


def make(device: str = "cpu", **config: Any) -> LocalTrainer:
    torch.manual_seed(0)
    model = CifarResNet((2, 1, 1), num_classes=4, widths=(8, 12, 16)).double().to(device)
    config = TrainerConfig(learning_rate=0.05, **copy.deepcopy(config))
    return LocalTrainer(model, config, example=torch.randn(2, 3, 8, 8, dtype=torch.float64))


def batches(count: int, device: str = "cpu", n: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.rand(n, 3, 8, 8, generator=draw, dtype=torch.float64).to(device), (torch.arange(n) % 4).to(device))
        for _ in range(count)
    ]


def on_streams(trainer: LocalTrainer, count: int) -> LocalTrainer:
    trainer._local_step.lanes = Streams(trainer.network, count, trainer.device)
    return trainer


def assert_alike(cuda: Races, plain: LocalTrainer, spread: LocalTrainer, given: list[tuple[Tensor, Tensor]]) -> None:
    """Both are the same after these batches, and no block worked with what was not there yet."""
    for batch in given:
        plain.step(batch)
        with cuda:
            spread.step(batch)
    assert cuda.found == []
    for a, b in zip(plain.persistent_tensors(), spread.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


STEPS = 2  # the second launches what every later one does: the first has no momentum yet


@functools.cache
def on_one_stream(case: str) -> tuple[list[StepResult], list[Tensor]]:
    trainer = make(**CASES[case])
    return [trainer.step(batch) for batch in batches(STEPS)], trainer.persistent_tensors()


@pytest.mark.parametrize(
    ("case", "streams"),
    [(case, n) for case in CASES for n in (2, 3, 16) if n <= CASES[case].get("blocks", n)],  # no more than blocks
)
def test_no_block_works_with_what_is_not_there_yet(cuda: Races, case: str, streams: int) -> None:
    results, tensors = on_one_stream(case)
    spread = on_streams(make(**CASES[case]), streams)
    for batch, expected in zip(batches(STEPS), results, strict=True):
        with cuda:
            found = spread.step(batch)
        assert all(torch.equal(a, b) for a, b in zip(expected.losses, found.losses, strict=True))
        assert torch.equal(expected.logits, found.logits)
    assert cuda.found == []
    for a, b in zip(tensors, spread.persistent_tensors(), strict=True):
        assert torch.equal(a, b)


def nothing(*args: Any) -> None: ...


def only_its_own(self: Stream, event: Clock) -> None:
    """As if the stream of the block before did not wait for the copy of its features."""
    if self is Stream.current:
        self._wait(event)


def too_early(self: Streams, index: int) -> None:
    """As if the features were there before the body has run."""
    self._handed_on[index] = {}  # type: ignore[assignment]


DEFECTS: dict[str, tuple[object, str, Any, str]] = {
    "a block does not wait": (Stream, "wait_event", nothing, "race"),
    "features handed on too early": (Streams, "_hand_on", too_early, "race"),
    "nothing waits for the blocks": (Streams, "_join", nothing, "race"),
    "features given back too early": (Stream, "wait_event", only_its_own, "memory of its own"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_stand_in_finds(cuda: Races, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    place, name, value, message = DEFECTS[defect]
    monkeypatch.setattr(place, name, value)
    trainer = on_streams(make(rule="man++", accumulate=2), 16)
    with cuda:
        for batch in batches(2):
            trainer.step(batch)
    assert any(found.startswith(message) for found in cuda.found)


def test_a_block_begins_beside_what_the_one_before_has_left_to_do(cuda: Races) -> None:
    """Its body waits for the body before it, not for that block's auxiliary network or backward pass."""
    trainer = on_streams(make(rule="dgl"), 16)
    waited: list[int] = []
    for before, block in zip(list(trainer.network), list(trainer.network)[1:], strict=False):
        end: Clock = {}

        def after_auxiliary(*_: Any, end: Clock = end) -> None:
            end.update({id(Stream.current): Stream.current.clock[id(Stream.current)]})

        def begin(*_: Any, end: Clock = end) -> None:
            ((stream, tick),) = end.items()
            waited.append(Stream.current.clock.get(stream, 0) >= tick)

        assert before.auxiliary is not None
        before.auxiliary.register_forward_hook(after_auxiliary)
        block.body.register_forward_pre_hook(begin)
    with cuda:
        trainer.step(batches(1)[0])
    assert waited == [False] * 4


def test_a_block_may_change_its_features_in_place(cuda: Races) -> None:
    """The block before still works with them, but not the same copy; nor are the images those of the caller."""

    def make_one() -> LocalTrainer:
        torch.manual_seed(0)
        unit = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        stem = [nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)]
        model = nn.Sequential(*stem, unit, nn.Flatten(), nn.Linear(4 * 16, 4)).double()
        return LocalTrainer(model, TrainerConfig(rule="dgl", blocks=2), example=(3, 8, 8))

    plain, spread = make_one(), on_streams(make_one(), 2)
    assert_alike(cuda, plain, spread, batches(2))


def test_features_that_the_head_looks_at_go_along(cuda: Races) -> None:
    def make_one() -> LocalTrainer:
        torch.manual_seed(0)
        return LocalTrainer(Skipping().double(), TrainerConfig(rule="dgl", learning_rate=0.05), example=(3, 8, 8))

    plain, spread = make_one(), on_streams(make_one(), 3)
    assert_alike(cuda, plain, spread, [(x, (x.sum(1) > 1.5).long()) for x, _ in batches(2)])


@pytest.mark.parametrize("rule", ["lookahead", "mlaan"])
def test_overlapping_blocks(cuda: Races, rule: str) -> None:
    with pytest.raises(ValueError, match=f"by the rule '{rule}'.*streams=1"):
        on_streams(make(rule=rule), 2)
    with pytest.raises(ValueError, match=f"by the rule '{rule}'.*streams=1"):
        make(rule=rule, cuda_graphs=True, streams=2)
    with pytest.raises(UserError, match=f"by the rule '{rule}'.*streams=1"):
        Settings.of({"data": "digits", "rule": rule, "cuda_graphs": True, "streams": 2})


def test_a_normalisation_that_two_blocks_share(cuda: Races) -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    units = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *units, nn.Flatten(), nn.Linear(4 * 36, 4)).double()
    trainer = LocalTrainer(model, TrainerConfig(rule="dgl"), example=(3, 8, 8))
    with pytest.raises(ValueError, match=r"blocks 1 and 2 share the buffer body\.0\.0\.1\.running_mean.*streams=1"):
        on_streams(trainer, 2)


class Averaging(nn.Module):
    """A criterion with a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, targets)
        self.mean.lerp_(loss.detach(), 0.1)
        return loss


def test_a_criterion_that_changes(cuda: Races) -> None:
    trainer, criterion = make(rule="dgl"), Averaging()
    trainer._local_step.lanes = Streams(trainer.network, 2, trainer.device, [criterion])
    for block in trainer.network:
        (block.auxiliary or block).criterion = criterion  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the criterion changes a buffer.*streams=1"), cuda:
        trainer.step(batches(1)[0])
    assert any(found.startswith("race: aten.lerp_") for found in cuda.found)


def test_what_comes_after_a_step_that_failed_waits_for_it(cuda: Races) -> None:
    trainer = on_streams(make(rule="dgl"), 3)
    last = list(trainer.network)[-1]
    last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError), cuda:
        trainer.step(batches(1)[0])
    lanes = trainer._local_step.lanes
    assert isinstance(lanes, Streams)
    for stream in lanes._streams:
        assert Stream.current.clock[id(stream)] == stream.clock[id(stream)] > 0


def test_settings() -> None:
    with pytest.raises(ValueError, match="streams has to be 1 or more, and is 0"):
        TrainerConfig(streams=0)
    with pytest.raises(TypeError, match=r"streams has to be a whole number, and is 2\.0"):
        TrainerConfig(streams=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="streams is of use for captured steps alone; set cuda_graphs too"):
        TrainerConfig(streams=2)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sleep(cycles: int, *_: Any) -> None:
    torch.cuda._sleep(cycles)


def slowed(trainer: LocalTrainer, slow: int) -> LocalTrainer:
    """With the auxiliary networks and backward passes of some blocks late, so that the other blocks are ahead."""
    for index, block in enumerate(trainer.network):
        if block.auxiliary is not None and index % 2 == slow:
            block.auxiliary.register_forward_pre_hook(functools.partial(sleep, 2_000_000))
            block.auxiliary.register_full_backward_hook(functools.partial(sleep, 2_000_000))
    return trainer


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str, slow: int) -> None:
    """Beside eager steps: values after a warm-up, replays, and a smaller batch, whoever of the blocks is late."""
    eager = make("cuda", **CASES[case])
    spread = slowed(make("cuda", cuda_graphs=True, streams=3, **CASES[case]), slow)
    for batch in [*batches(6, "cuda"), *batches(1, "cuda", n=4), *batches(2, "cuda")]:
        a, b = eager.step(batch), spread.step(batch)
        for x, y in zip([*a.losses, a.logits], [*b.losses, b.logits], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)
    for x, y in zip(eager.persistent_tensors(), spread.persistent_tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.cuda
@needs_gpu
def test_memory_that_does_not_suffice_on_a_gpu() -> None:
    """In the middle of a capture on several streams; training goes on."""
    eager, spread = make("cuda", rule="man++"), make("cuda", rule="man++", cuda_graphs=True, streams=3)
    for batch in batches(3, "cuda"):
        eager.step(batch)
        spread.step(batch)
    middle = list(spread.network)[2].auxiliary
    assert middle is not None

    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    hook = middle.register_forward_pre_hook(too_much)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        spread.step(batches(1, "cuda")[0])
    hook.remove()
    for batch in batches(5, "cuda"):
        eager.step(batch)
        spread.step(batch)
    for x, y in zip(eager.persistent_tensors(), spread.persistent_tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)
