"""Timing: contenders measured in turns, so that drift of the machine falls on all of them alike."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import manpp_kernels

Call = Callable[[], object]


@dataclass
class Contender:
    """One way to do the work of a row.

    Attributes:
        name: as it appears in tables.
        calls: the work, once for each input set; the timer goes round them.
        ours: this package's, as against a peer.
        backend: of this package, in force while it is timed.
        capture: whether it can be captured in a CUDA graph.
    """

    name: str
    calls: Sequence[Call]
    ours: bool = False
    backend: str | None = None
    capture: bool = True

    def in_force(self) -> contextlib.AbstractContextManager[object]:
        return manpp_kernels.use_backend(self.backend) if self.backend else contextlib.nullcontext()


@dataclass(frozen=True)
class Sample:
    """Seconds a call: the median over the rounds, the quartiles, the least, and how much was timed."""

    median: float
    least: float
    low: float
    high: float
    rounds: int
    calls: int

    @staticmethod
    def of(times: list[float], calls: int) -> Sample:
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return Sample(statistics.median(times), min(times), low, high, len(times), calls)


class HostClock:
    """Wall time of calls that are done when they return."""

    def __init__(self, contender: Contender) -> None:
        self._calls = contender.calls
        self._next = 0

    def round_up(self, count: int) -> int:
        return count

    def order(self, count: int) -> list[Call]:
        """The next ``count`` calls, going on where the last round ended among the input sets."""
        calls, size = self._calls, len(self._calls)
        order = [calls[(self._next + i) % size] for i in range(count)]
        self._next = (self._next + count) % size
        return order

    def time(self, count: int) -> float:
        """Seconds that ``count`` calls take."""
        order = self.order(count)
        start = time.perf_counter_ns()
        for call in order:
            call()
        return (time.perf_counter_ns() - start) * 1e-9


class DeviceClock(HostClock):
    """Time between two events on the device, the calls queued as fast as the host can."""

    HEAD_START = 2_000_000  # cycles of the device, some 1.1 ms: a slow host's first backward pass takes half of that

    def __init__(self, contender: Contender) -> None:
        super().__init__(contender)
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._waits_for_device = False

    def time(self, count: int) -> float:
        order = self.order(count)
        torch.cuda.synchronize()
        if self._waits_for_device:
            # Else the device waits for the host's first call, and where calls are long a round has one or two.
            torch.cuda._sleep(self.HEAD_START)
        self._start.record()
        begin = time.perf_counter()
        for call in order:
            call()
        self._end.record()
        queued = time.perf_counter() - begin
        self._end.synchronize()
        seconds = self._start.elapsed_time(self._end) * 1e-3
        self._waits_for_device = queued < seconds / 2
        return seconds


class GraphClock(DeviceClock):
    """The same for replays of a CUDA graph that holds a call for every input set."""

    def __init__(self, contender: Contender) -> None:
        super().__init__(contender)
        self._work = len(contender.calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            contender.calls[0]()
            torch.cuda.synchronize()
            # Not by torch.cuda.graph, which empties the allocator's cache each time: there are hundreds of captures.
            self._graph.capture_begin()
            try:
                for call in contender.calls:
                    call()
            except Exception:
                _leave_capture(self._graph)
                raise
            self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._calls = [self._graph.replay]

    def round_up(self, count: int) -> int:
        return math.ceil(count / self._work) * self._work

    def time(self, count: int) -> float:
        return super().time(count // self._work)


def _leave_capture(failed: torch.cuda.CUDAGraph) -> None:
    """After an error in a capture: random numbers stay in its mode until one ends well, for all contenders after it."""
    with contextlib.suppress(RuntimeError):
        failed.capture_end()
    with contextlib.suppress(RuntimeError):
        whole = torch.cuda.CUDAGraph()
        whole.capture_begin()
        whole.capture_end()


class LaunchClock(HostClock):
    """Host time of calls alone: the device is waited for before and after, outside of the measured time."""

    def time(self, count: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = super().time(count)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return seconds


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for each contender, over so many rounds."""

    seconds: float
    rounds: int
    most_calls: int = 100_000


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def race(
    contenders: Sequence[Contender], clock: type[HostClock], effort: Effort
) -> tuple[dict[str, Sample], dict[str, str]]:
    """Measure every contender, in turns, in another order in every round.

    What runs next pays for what the one before left: in the caches, and threads of another pool that still spin, as
    those of compiled code do.

    Returns:
        A sample for each contender, and for those that cannot do the work the reason.
    """
    running: dict[str, tuple[Contender, HostClock, int]] = {}
    failed: dict[str, str] = {}
    for contender in contenders:
        try:
            with contender.in_force():
                timer = clock(contender)
                timer.time(timer.round_up(1))  # load, compile, build tables
                timer.time(timer.round_up(len(contender.calls)))
                once = timer.round_up(1)
                seconds = min(timer.time(once) for _ in range(2)) / once
        except Exception as error:
            if contender.ours:
                raise
            failed[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            continue
        wanted = max(1, min(effort.most_calls, int(effort.seconds / effort.rounds / max(seconds, 1e-9))))
        running[contender.name] = contender, timer, timer.round_up(wanted)
    times: dict[str, list[float]] = {name: [] for name in running}
    order = random.Random(0)
    with quiet():
        for done in range(effort.rounds):
            for name in order.sample(list(running), len(running)):
                contender, timer, count = running[name]
                # A call that takes longer than its share is measured five times, not in every round.
                if done >= 5 and sum(times[name]) * count > effort.seconds:
                    continue
                with contender.in_force():
                    times[name].append(timer.time(count) / count)
    return {name: Sample.of(times[name], len(times[name]) * running[name][2]) for name in running}, failed


def step_times(seconds: Sequence[float]) -> dict[str, float]:
    """What a row says of the times of one kind of step, over all rounds."""
    return {
        "seconds": round(statistics.median(seconds), 6),
        "min_seconds": round(min(seconds), 6),
        "max_seconds": round(max(seconds), 6),
    }


def quotient(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over the rounds of the quotient within a round, which drift leaves alone."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 4)
