"""``DetachBuffer``: values, fixed addresses, smaller batches, the order of producer and consumer, and misuse."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from conftest import Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from manpp_kernels import DetachBuffer
from manpp_kernels.ops import detach_buffer


def test_put_copies_and_detaches(target: Target) -> None:
    buffer = DetachBuffer()
    x = torch.randn(4, 3, device=target.device, requires_grad=True)
    y = buffer.put(x * 2)
    assert torch.equal(y, x * 2)
    assert not y.requires_grad
    assert y.is_leaf
    buffer.release(y)
    other = buffer.put(x)
    assert other.data_ptr() != y.data_ptr()
    assert torch.equal(y, x * 2), "the other slot is left as it was"


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_addresses_are_fixed_and_go_round(target: Target, slots: int) -> None:
    buffer = DetachBuffer(slots)
    addresses = []
    for i in range(3 * slots):
        y = buffer.put(torch.full((2, 3), float(i), device=target.device))
        addresses.append(y.data_ptr())
        buffer.release(y)
    assert len(set(addresses)) == slots
    assert addresses == addresses[:slots] * 3


def test_a_smaller_batch_takes_the_front_of_its_slot(target: Target) -> None:
    buffer = DetachBuffer(slots=1, memory_format=torch.channels_last)
    full = buffer.put(torch.zeros(8, 3, 4, 5, device=target.device))
    buffer.release(full)
    x = torch.randn(5, 3, 4, 5, device=target.device)
    part = buffer.put(x)
    assert part.shape == x.shape
    assert torch.equal(part, x)
    assert part.data_ptr() == full.data_ptr()
    assert part.is_contiguous(memory_format=torch.channels_last)
    assert (full[5:] == 0).all(), "what lies behind is left alone"
    buffer.release(part)
    nothing = buffer.put(x[:0])
    assert nothing.shape == (0, 3, 4, 5)
    buffer.release(nothing)
    assert buffer.put(torch.ones(8, 3, 4, 5, device=target.device)).data_ptr() == full.data_ptr()
    assert buffer.capacity == (8, 3, 4, 5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [None, torch.contiguous_format, torch.channels_last], ids=str)
def test_dtype_and_memory_format(target: Target, dtype, memory_format) -> None:
    buffer = DetachBuffer(dtype=dtype, memory_format=memory_format)
    x = torch.randn(2, 3, 4, 5, device=target.device)
    y = buffer.put(x)
    assert torch.equal(y, x.to(dtype or torch.float32))
    assert y.is_contiguous(memory_format=memory_format or torch.contiguous_format)
    buffer.release(y)
    y = buffer.put(x.to(memory_format=torch.channels_last))
    assert torch.equal(y, x.to(dtype or torch.float32)), "another layout is copied into that of the slots"
    assert y.is_contiguous(memory_format=memory_format or torch.contiguous_format)
    if dtype is not None:
        buffer.release(y)
        assert torch.equal(buffer.put(x.half()), x.half().to(dtype)), "any dtype is cast"


def test_layout_of_the_first_activation(target: Target) -> None:
    x = torch.randn(2, 3, 4, 5, device=target.device).to(memory_format=torch.channels_last)
    assert DetachBuffer().put(x).stride() == x.stride()
    expanded = torch.randn(1, 3, device=target.device).expand(4, 3)
    assert torch.equal(DetachBuffer().put(expanded), expanded)
    assert DetachBuffer().put(torch.tensor(3.0, device=target.device)).item() == 3.0


def test_get_returns_the_oldest_first(target: Target) -> None:
    buffer = DetachBuffer(slots=3)
    first, second = (buffer.put(torch.full((2,), float(i), device=target.device)) for i in range(2))
    assert buffer.get() is first
    third = buffer.put(torch.full((2,), 2.0, device=target.device))
    assert buffer.get() is second
    buffer.release(first)
    fourth = buffer.put(torch.full((2,), 3.0, device=target.device))
    buffer.release(second)
    assert buffer.get() is third
    assert buffer.get() is fourth
    assert buffer.in_use == 2


def test_what_was_released_untaken_is_passed_over(target: Target) -> None:
    buffer = DetachBuffer(slots=2)
    for i in range(5):
        buffer.release(buffer.put(torch.full((2,), float(i), device=target.device)))
    first, second = (buffer.put(torch.full((2,), float(i), device=target.device)) for i in (5, 6))
    assert buffer.get() is first
    assert buffer.get() is second
    with pytest.raises(RuntimeError, match="nothing was put"):
        buffer.get()


def test_gradients_stop_at_the_buffer(target: Target) -> None:
    """Two blocks trained across it, as often as the ring goes round."""
    buffer = DetachBuffer(slots=2)
    lower, upper = nn.Linear(3, 4).to(target.device), nn.Linear(4, 2).to(target.device)
    for _ in range(5):
        x = torch.randn(6, 3, device=target.device)
        h = lower(x)
        y = buffer.put(h)
        h.square().mean().backward()
        local = [p.grad.clone() for p in lower.parameters()]
        y.requires_grad_()  # as a rule that sends a gradient back itself would do
        upper(y).square().mean().backward()
        assert y.grad is not None
        assert all(torch.equal(p.grad, g) for p, g in zip(lower.parameters(), local, strict=True))
        buffer.release(y)
        lower.zero_grad()
        upper.zero_grad()


def test_a_graph_whose_activation_was_overwritten_raises(target: Target) -> None:
    buffer = DetachBuffer(slots=1)
    upper = nn.Linear(4, 2).to(target.device)
    y = buffer.put(torch.randn(6, 4, device=target.device))
    loss = upper(y).sum()
    buffer.release(y)
    buffer.put(torch.randn(6, 4, device=target.device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reserve(target: Target) -> None:
    buffer = DetachBuffer()
    assert buffer.capacity is None
    buffer.reserve(torch.empty(8, 3, device=target.device))
    assert buffer.capacity == (8, 3)
    y = buffer.put(torch.ones(5, 3, device=target.device))
    with pytest.raises(RuntimeError, match="1 of 2 slots are in use"):
        buffer.reserve(torch.empty(16, 3, device=target.device))
    assert buffer.capacity == (8, 3)
    buffer.release(y)
    buffer.reserve(torch.empty(16, 3, device=target.device))
    assert buffer.put(torch.ones(16, 3, device=target.device)).shape == (16, 3)


def test_a_buffer_first_used_in_inference_serves_training(target: Target) -> None:
    buffer = DetachBuffer(slots=1)
    with torch.inference_mode():
        buffer.release(buffer.put(torch.ones(2, 4, device=target.device)))
    upper = nn.Linear(4, 2).to(target.device)
    upper(buffer.put(torch.randn(2, 4, device=target.device))).sum().backward()
    assert upper.weight.grad is not None


@pytest.mark.parametrize("make", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_a_copy_is_empty(make) -> None:
    buffer = DetachBuffer(3, dtype=torch.bfloat16, memory_format=torch.channels_last)
    buffer.put(torch.ones(2, 3, 4, 5))
    other = make(buffer)
    assert (other.slots, other.dtype, other.memory_format) == (3, torch.bfloat16, torch.channels_last)
    assert other.in_use == 0
    assert other.capacity is None
    assert other.put(torch.ones(1, 3, 4, 5)).data_ptr() != 0


def test_misuse_of_the_options() -> None:
    for slots, kind, found in [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (1.5, TypeError, "float"),
        (True, TypeError, "bool"),
    ]:
        with pytest.raises(kind, match=rf"slots.*{found}"):
            DetachBuffer(slots)
    with pytest.raises(TypeError, match=r"dtype.*str"):
        DetachBuffer(dtype="half")
    with pytest.raises(TypeError, match=r"dtype.*complex64"):
        DetachBuffer(dtype=torch.cfloat)
    with pytest.raises(TypeError, match=r"memory_format.*int"):
        DetachBuffer(memory_format=3)
    with pytest.raises(ValueError, match=r"memory_format.*4 dimensions.*\(2, 3\)"):
        DetachBuffer(memory_format=torch.channels_last).put(torch.ones(2, 3))


def test_misuse(target: Target) -> None:
    buffer = DetachBuffer(slots=2)
    with pytest.raises(RuntimeError, match="nothing was put"):
        buffer.get()
    first = buffer.put(torch.zeros(4, 3, device=target.device))
    x = torch.ones(4, 3, device=target.device)
    wrong = [
        (None, TypeError, "x .*NoneType"),
        (x.cfloat(), TypeError, "x .*complex64"),
        (x.to_sparse(), TypeError, "x .*sparse"),
        (x.half(), TypeError, r"x is torch\.float16.*torch\.float32"),
        (x.int(), TypeError, r"x is torch\.int32.*torch\.float32"),
        (x.t(), ValueError, r"\(3, 4\).*\(4, 3\)"),
        (x[0], ValueError, r"\(3,\).*\(4, 3\)"),
        (x[:, :2], ValueError, r"\(4, 2\).*\(4, 3\)"),
        (torch.ones(5, 3, device=target.device), ValueError, r"batch of 5.*hold 4.*reserve"),
        (x.to("meta"), ValueError, "x is on meta.*slots"),
    ]
    for bad, kind, message in wrong:
        with pytest.raises(kind, match=message):
            buffer.put(bad)
    assert (first == 0).all(), "nothing was written"
    second = buffer.put(x)
    with pytest.raises(RuntimeError, match="the next of 2 slots is in use"):
        buffer.put(x)
    for stranger in (x, first.clone(), first[:2], None):
        with pytest.raises(ValueError, match="not an activation of this buffer"):
            buffer.release(stranger)
    buffer.release(first)
    with pytest.raises(ValueError, match="not an activation of this buffer"):
        buffer.release(first)
    with pytest.raises(ValueError, match="overlaps"):
        buffer.put(first)  # into the very slot it is in
    assert buffer.in_use == 1
    assert buffer.get() is second


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(1, 4),
    actions=st.lists(st.sampled_from(["put", "get", "release"]), max_size=40),
    seed=st.integers(0, 99),
)
def test_any_history(target: Target, slots: int, actions: list[str], seed: int) -> None:
    """Against a list of what is in use: nothing in use is ever overwritten, and get goes by age."""
    generator = torch.Generator().manual_seed(seed)
    buffer, in_use, puts = DetachBuffer(slots), [], 0
    occupied: dict[int, int] = {}  # slot: number of its put
    for action in actions:
        if action == "put":
            size = int(torch.randint(0, 5, (), generator=generator)) if puts else 4
            x = torch.full((size, 2), float(puts), device=target.device)
            if puts % slots in occupied:
                with pytest.raises(RuntimeError, match="in use"):
                    buffer.put(x)
                continue
            occupied[puts % slots] = puts
            in_use.append({"y": buffer.put(x), "number": puts, "size": size, "taken": False})
            puts += 1
        elif action == "get":
            waiting = [entry for entry in in_use if not entry["taken"]]
            if not waiting:
                with pytest.raises(RuntimeError, match="nothing was put"):
                    buffer.get()
                continue
            assert buffer.get() is waiting[0]["y"]
            waiting[0]["taken"] = True
        elif in_use:
            entry = in_use.pop(int(torch.randint(0, len(in_use), (), generator=generator)))
            buffer.release(entry["y"])
            del occupied[entry["number"] % slots]
        assert buffer.in_use == len(in_use)
        for entry in in_use:
            assert entry["y"].shape == (entry["size"], 2)
            assert (entry["y"] == entry["number"]).all()


def test_producer_and_consumer_in_threads() -> None:
    buffer, received = DetachBuffer(slots=3), []
    free, filled = threading.Semaphore(3), threading.Semaphore(0)

    def consume() -> None:
        for _ in range(200):
            filled.acquire()
            y = buffer.get()
            received.append(int(y[0]))
            buffer.release(y)
            free.release()

    consumer = threading.Thread(target=consume)
    consumer.start()
    for i in range(200):
        free.acquire()
        buffer.put(torch.full((4,), float(i)))
        filled.release()
    consumer.join(timeout=60)
    assert received == list(range(200))


def test_the_order_of_waits_and_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol that keeps streams apart, without streams: who waits for what, before and after which copy."""
    log: list[str] = []

    class Fence:
        made = 0

        def __init__(self, memory: torch.Tensor) -> None:
            self.name = ("written", "released")[Fence.made % 2] + str(Fence.made // 2)
            Fence.made += 1

        def record(self) -> None:
            log.append(f"record {self.name}")

        def wait(self) -> None:
            log.append(f"wait {self.name}")

    copy_ = detach_buffer.detach_copy
    monkeypatch.setattr(detach_buffer, "_Fence", Fence)
    monkeypatch.setattr(detach_buffer, "detach_copy", lambda *a: (log.append("copy"), copy_(*a))[1])
    buffer = DetachBuffer(slots=2)
    for _ in range(3):
        buffer.put(torch.ones(2))
        y = buffer.get()
        buffer.release(y)
    turn = ["wait released{0}", "copy", "record written{0}", "wait written{0}", "record released{0}"]
    reserved = ["record released0", "record released1"]
    assert log == reserved + [line.format(slot) for slot in (0, 1, 0) for line in turn]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("slow", ["producer", "consumer"])
def test_streams(slow: str) -> None:
    """Either side falls behind by milliseconds; without the events values would be read too early or overwritten."""
    buffer, sums = DetachBuffer(slots=2), []
    producing, consuming = torch.cuda.Stream(), torch.cuda.Stream()
    buffer.reserve(torch.empty(1 << 16, device="cuda"))
    values = [torch.full((1 << 16,), float(i), device="cuda") for i in range(12)]
    torch.cuda.synchronize()
    for x in values:
        with torch.cuda.stream(producing):
            if slow == "producer":
                torch.cuda._sleep(5_000_000)
            buffer.put(x)
        with torch.cuda.stream(consuming):
            y = buffer.get()
            if slow == "consumer":
                torch.cuda._sleep(5_000_000)
            sums.append(y.sum())
            buffer.release(y)
    torch.cuda.synchronize()
    assert [int(s) >> 16 for s in sums] == list(range(12))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph() -> None:
    buffer = DetachBuffer(slots=2)
    x = torch.zeros(64, 8, device="cuda")
    buffer.release(buffer.put(x))  # allocates; a slot is in use by no one when the capture starts
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = buffer.put(x)
        z = y * 2
        buffer.release(y)
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert (y == value).all()
        assert (z == 2 * value).all()
    assert torch.equal(buffer.put(x + 1), x + 1), "and outside of the graph again"
