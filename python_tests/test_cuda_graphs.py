"""Operators and plans inside CUDA graphs and on several streams at once: the values, beside those of eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import manpp_kernels
from manpp_kernels import EmaPlan, detach_copy, ema_scale_update, scale_bias_mix

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BACKENDS = [b for b in manpp_kernels.available() if b in ("cuda", "triton")]
# Small and large tensors, sums over several blocks, and more groups than one.
SIZES = (7, 4800, 33, 40_000, 1)
GROUPS = [0, 1, 1, 2, 0]


class Work:
    """One of everything, on inputs that a test changes in place between its runs."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator(device="cuda").manual_seed(seed)

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=draw)

        self.ema, self.params, self.bias, self.grad = ([new(n) for n in SIZES] for _ in range(4))
        self.scale = (new(3) * 0.1 + 1).requires_grad_()
        self.bias = [b.requires_grad_() for b in self.bias]
        self.momentum = torch.tensor(0.9, device="cuda")
        self.maps = [new(8, 16, 33, 31).requires_grad_() for _ in range(2)]
        self.channels = (new(16) * 0.1 + 1).requires_grad_()
        self.map_grad = new(8, 16, 33, 31)

    def tensors(self) -> list[Tensor]:
        return [*self.ema, *self.params, *self.bias, *self.grad, self.scale, *self.maps, self.channels, self.map_grad]

    @torch.no_grad()
    def change(self, step: int) -> None:
        for i, t in enumerate(self.tensors()):
            t.add_(0.01 * ((step + i) % 7))
        self.momentum.fill_(0.9 - 0.1 * step)

    def copy_from(self, other: Work) -> None:
        with torch.no_grad():
            for a, b in zip([*self.tensors(), self.momentum], [*other.tensors(), other.momentum], strict=True):
                a.copy_(b)

    def run(self, update: Callable[[], list[Tensor]]) -> list[Tensor]:
        weights = update()
        weight_grads = torch.autograd.grad(weights, [self.scale, *self.bias], self.grad)
        mixed = scale_bias_mix(*self.maps, self.channels)
        map_grads = torch.autograd.grad(mixed, [*self.maps, self.channels], self.map_grad)
        copy = detach_copy(self.maps[0], dtype=torch.bfloat16, memory_format=torch.channels_last)
        return [t.detach() for t in (*self.ema, *weights, *weight_grads, mixed, *map_grads, copy)]

    def by_operator(self) -> list[Tensor]:
        return self.run(
            lambda: ema_scale_update(
                self.ema, self.params, self.momentum, scale=self.scale, bias=self.bias, groups=GROUPS
            )
        )

    def by_plan(self) -> Callable[[], list[Tensor]]:
        plan = EmaPlan(self.ema, self.params, bias=self.bias, groups=GROUPS)
        return lambda: self.run(lambda: plan.update(self.momentum, scale=self.scale))


def expected(work: Work) -> list[Tensor]:
    with manpp_kernels.use_backend("eager"):
        return work.by_operator()


def assert_same(found: list[Tensor], exact: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-3, msg=lambda m, i=i: f"result {i}: {m}")


def capture(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def warm_up(call: Callable[[], object]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["operator", "plan", "plan, first used inside"])
def test_replays_follow_what_changed(backend: str, way: str) -> None:
    """Inputs, momentum and scale: none of them is frozen into the graph, and each replay counts anew."""
    work, reference = Work(0), Work(0)
    with manpp_kernels.use_backend(backend):
        call = work.by_operator if way == "operator" else work.by_plan()
        # Kernels have to be compiled before, by another plan where this one is to meet its capture fresh.
        warm_up(Work(1).by_plan() if way == "plan, first used inside" else call)
        graph, results = capture(call)
        for step in range(4):
            work.change(step)
            reference.copy_from(work)
            graph.replay()
            assert_same(results, expected(reference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_that_is_first_used_in_a_capture_serves_outside_and_in_another(backend: str) -> None:
    work, reference = Work(0), Work(0)
    with manpp_kernels.use_backend(backend):
        warm_up(Work(1).by_plan())
        call = work.by_plan()
        first, _ = capture(call)
        second, results = capture(call)
        reference.copy_from(work)
        assert_same(call(), expected(reference))  # before either graph has run
        for graph, check in ((second, True), (first, False)):
            reference.copy_from(work)
            graph.replay()
            exact = expected(reference)
            if check:
                assert_same(results, exact)
            assert_same(work.ema, exact[: len(SIZES)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_outlives_what_its_plan_replaced(backend: str) -> None:
    """A tensor moves away and back: the plan builds itself anew, and the graph reads what it was captured with."""
    work, reference = Work(0), Work(0)
    plan = EmaPlan(work.ema, work.params)
    with manpp_kernels.use_backend(backend):
        warm_up(lambda: plan.update(0.5))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.update(0.5)
        home = work.ema[1].data
        work.ema[1].data = home.clone()
        plan.update(0.5)
        work.ema[1].data = home
        plan.update(0.5)
        junk = [torch.full((1 << 14,), -1, dtype=torch.int64, device="cuda") for _ in range(64)]
        reference.copy_from(work)
        graph.replay()
    for e, before, p in zip(work.ema, reference.ema, work.params, strict=True):
        torch.testing.assert_close(e, 0.5 * before + 0.5 * p)
    assert junk[0][0] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend: str) -> None:
    """Reductions count the blocks that have arrived: not those of another stream."""
    works, references = [Work(0), Work(1)], [Work(0), Work(1)]
    streams = [torch.cuda.Stream() for _ in works]
    with manpp_kernels.use_backend(backend):
        calls = [work.by_plan() for work in works]
        exact = [[expected(reference) for _ in range(20)][-1] for reference in references]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[], []]
        for _ in range(20):
            for i, (call, stream) in enumerate(zip(calls, streams, strict=True)):
                with torch.cuda.stream(stream):
                    found[i] = call()
        torch.cuda.synchronize()
    for results, right in zip(found, exact, strict=True):
        assert_same(results, right)


def leave_an_update_running(backend: str, *lists: Any, **options: Any) -> None:
    """The second, on another stream, of a plan that is gone by then."""
    stream = torch.cuda.Stream()
    with manpp_kernels.use_backend(backend):
        plan = EmaPlan(*lists, **options)
        plan.update(0.5)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            plan.update(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_is_not_given_back_while_another_stream_draws_it(backend: str) -> None:
    ema, params = torch.zeros(64, dtype=torch.bfloat16, device="cuda"), torch.ones(64, device="cuda")
    leave_an_update_running(backend, ema, params, rounding="stochastic")
    junk = [torch.full((), -1, dtype=torch.int64, device="cuda") for _ in range(256)]
    torch.cuda.synchronize()
    assert [t.item() for t in junk] == [-1] * len(junk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_may_go_while_another_stream_still_runs_its_update(backend: str) -> None:
    work, expected = Work(0), Work(0)
    ema_scale_update(expected.ema, expected.params, 0.5)
    ema_scale_update(expected.ema, expected.params, 0.5)
    leave_an_update_running(backend, work.ema, work.params)
    # Whatever the plan's table took, these take now.
    junk = [torch.full((n,), -1, dtype=torch.int64, device="cuda") for n in (64, 512, 4096) for _ in range(64)]
    torch.cuda.synchronize()
    assert junk
    for a, b in zip(work.ema, expected.ema, strict=True):
        torch.testing.assert_close(a, b)
