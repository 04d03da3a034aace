"""A pipeline: the local blocks of a network shared out over the ranks of a process group, each rank some in a row.

A rank hands on the features of its last block and goes on, with what its blocks have left to do and then with the next
batch: no gradient comes back that it would have to wait for. All that comes back are parameters, where an EMA follows
a unit that another rank trains. The values are those of the blocks one after the other in one process.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manpp_kernels.local.network import LocalBlock, LocalNetwork
from manpp_kernels.training.config import TrainerConfig
from manpp_kernels.training.epoch import EpochTotals
from manpp_kernels.training.group import Group, alike, broadcast, flatten, unflatten
from manpp_kernels.training.progress import length_of

# A rank keeps what it hands on until it is taken, and is at most so many steps ahead of who takes it.
_STEPS_AHEAD = 2


class Pipeline(Group):
    """This rank's part of a pipeline over the default process group; all its methods are called on every rank.

    Args:
        network: all of it, on every rank; rank 0's values become everyone's.
        device: that this rank trains on.
        config: says in ``pipeline`` how many blocks each rank trains; True shares them out evenly, in doubt more to the
            later ranks.

    Raises:
        RuntimeError: there is no process group.
        ValueError: the numbers do not fit the ranks and the blocks; the config is another on another rank; two ranks
            would train the same tensor; the process group, or a layer, is not for pipelines.
    """

    parts = (*Group.parts, "optimizers", "schedulers", "classes")

    def __init__(self, network: LocalNetwork, device: torch.device, config: TrainerConfig) -> None:
        super().__init__("pipeline", network.persistent_tensors(), device)
        # As text, which can be sent and compared whatever it is; a rule's options have none where they hold functions.
        fields = (f.name for f in dataclasses.fields(config) if f.name not in ("rule_options", "measure_memory"))
        self.agree(**{name: repr(getattr(config, name)) for name in fields})
        backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
        if device.type != "cpu" and backends.get(device.type, "gloo") == "gloo":  # which sends the CPU's alone
            raise ValueError(
                f"the process group hands on no tensors of {device.type}, where this rank trains; give "
                "init_process_group() a backend that does, such as 'cpu:gloo,cuda:nccl', or train on the CPU"
            )
        if any(isinstance(m, nn.SyncBatchNorm) for m in network.modules()):
            raise ValueError(
                "SyncBatchNorm waits for all ranks, and in a pipeline one alone runs it, on whole batches; take the "
                "ordinary batch normalisation"
            )
        # Groups of its own, where nothing comes in between that another trainer was sent and has not taken.
        host: Any = dist.new_group(backend="gloo")
        self._host = self._on = self._back = host
        if device.type != "cpu":
            # Two, as parameters on their way back are not to wait behind features on their way on.
            self._on, self._back = dist.new_group(), dist.new_group()
        self._mail = _Mail(self._host)
        self._counts = _counts(config.pipeline, len(network), self.count)
        owner = [rank for rank, count in enumerate(self._counts) for _ in range(count)]
        self._range = range(owner.index(self.rank), owner.index(self.rank) + self._counts[self.rank])
        self._taken = network.partition.handed_on(self._range.start - 1) if self.rank > 0 else 0
        home = _homes(network, owner)
        self._blocks = [[b for b, its in zip(network, owner, strict=True) if its == rank] for rank in range(self.count)]
        # By rank and block: the parameters that the EMAs of a block follow, and that another rank trains.
        followed = [
            (owner[j], j, home[source], source)
            for j, block in enumerate(network)
            for transform in block.transforms
            for _, source in transform.pairs()
            if owner[home[source]] != owner[j]
        ]
        self._followers = {j for rank, j, _, _ in followed if rank == self.rank}
        # Of each rank that this one's EMAs look at, all parameters: one message a step.
        self._awaited: dict[int, list[Tensor]] = defaultdict(list)
        asked: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        # A parameter goes once, whatever the number of blocks whose EMAs follow it.
        for rank, block, source in dict.fromkeys((rank, block, source) for rank, _, block, source in followed):
            if rank == self.rank:
                self._awaited[owner[block]].append(source)
            elif owner[block] == self.rank:
                asked[rank].append((block, source))
        # And of each rank whose EMAs look at this one's, once the last of the blocks that they are of has moved.
        self._due: dict[int, list[tuple[int, list[Tensor]]]] = defaultdict(list)
        for rank, pairs in asked.items():
            self._due[max(block for block, _ in pairs)].append((rank, [source for _, source in pairs]))
        self._behind = self._apart = False

    def describe(self) -> dict[str, object]:
        return {"ranks": self.count, "pipeline": list(self._counts)}

    def own(self, blocks: int) -> range:
        return self._range

    def loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Rank 0's own, whose batches are handed on; elsewhere their numbers, so that no rank loads in vain."""
        lengths = self.gather(length_of(loader))
        if None in lengths or len(set(lengths)) > 1:
            raise ValueError(
                "a pipeline needs loaders that say how many batches they have, on every rank the same number, and "
                f"they have {', '.join('an unknown number' if n is None else str(n) for n in lengths)}"
            )
        self._length = lengths[0]
        return loader if self.rank == 0 else range(self._length)

    def counted(self, batches: Iterable[Any], done: int) -> Iterator[Any]:
        for batch in batches:
            if done == self._length:
                raise self._miscounted("more")
            yield batch
            done += 1
        if done < self._length:
            raise self._miscounted(str(done))

    def _miscounted(self, given: str) -> ValueError:
        return ValueError(
            f"the loader says that it has {self._length} batches, and gave {given}: the other ranks of a pipeline take "
            "as many as it says"
        )

    def batch(self, batch: Any) -> Any:
        """Rank 0's becomes everyone's."""
        self._mail.begin_step()
        self._apart = True
        return batch if self.rank == 0 else (self._receive(), self._receive())

    def hand_on(self, *tensors: Tensor) -> None:
        for t in tensors if self.rank + 1 < self.count else ():
            self._mail.send(t, self.rank + 1, self._on)

    def take(self, block: int, x: Any) -> Any:
        if block != self._range.start or self.rank == 0:
            return x
        found = tuple(self._receive() for _ in range(self._taken))
        return found if self._taken > 1 else found[0]

    def give(self, block: int, x: Any) -> None:
        if block == self._range.stop - 1:
            self.hand_on(*(x if isinstance(x, tuple) else (x,)))

    def _receive(self) -> Tensor:
        return self._mail.receive(self.rank - 1, self._device, self._on)

    def moved(self, block: int) -> None:
        for rank, tensors in self._due[block]:
            for group in alike(tensors):
                self._mail.send(flatten([t.detach() for t in group]), rank, self._back)
        self._behind |= block == self._range.stop - 1

    def fetch(self, block: int | None) -> None:
        if self._behind and (block is None or block in self._followers):
            self._catch_up()

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Have the followed parameters as the last step left them."""
        for rank, tensors in self._awaited.items():
            for group in alike(tensors):
                unflatten(self._mail.receive(rank, self._device, self._back), group)
        self._behind = False

    def collect(self) -> None:
        if not self._apart:
            return
        if self._behind:
            self._catch_up()
        for rank, blocks in enumerate(self._blocks):
            # Looked up anew, as a forward pass may put another tensor in a buffer's place; what blocks share, once.
            broadcast(list(dict.fromkeys(itertools.chain.from_iterable(map(_tensors, blocks)))), rank)
        self._mail.wait(ahead=0)
        self._apart = False

    def end_epoch(self) -> None:
        self.collect()

    def totals(self, own: EpochTotals) -> EpochTotals:
        """The last rank's, which has the logits; of times and memory the largest of any."""
        numbers = own.numbers()
        every = self.gather(numbers)
        summed = ("loss", "correct", "answered", "images")
        return EpochTotals(
            **{name: every[-1][name] if name in summed else max(e[name] for e in every) for name in numbers}
        )

    def to_first(self, value: Any) -> list[Any]:
        """By way of the host, as it may be the state of all optimizers, which fits no other rank."""
        values: list[Any] = [None] * self.count
        dist.gather_object(_on_cpu(value), values if self.rank == 0 else None, group=self._host)
        return values


# As torch.distributed types what new_group gives, to those who are no members too.
_Group = dist.ProcessGroup | Any


class _Mail:
    """Tensors from rank to rank, of whatever size, dtype and layout, in order, without waiting until they are taken.

    Args:
        host: a group by way of the host, in which what a tensor is goes ahead of it.
    """

    _DTYPES = (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        torch.bool,
    )
    _DIMENSIONS = 8  # at most

    def __init__(self, host: _Group) -> None:
        self._host = host
        self._sent: deque[list[Any]] = deque()

    def begin_step(self) -> None:
        """Wait for what was sent :data:`_STEPS_AHEAD` steps ago."""
        self.wait(ahead=_STEPS_AHEAD - 1)
        self._sent.append([])

    def wait(self, ahead: int) -> None:
        """Until all is taken but what was sent in the last steps, as many as are ``ahead``; it is let go of."""
        while len(self._sent) > ahead:
            for work, _ in self._sent.popleft():
                work.wait()

    def send(self, t: Tensor, to: int, group: _Group) -> None:
        # A copy, as what it is of may change while it is on its way; dense, whatever that is.
        t = t.detach().clone()
        if t.dtype not in self._DTYPES or t.dim() > self._DIMENSIONS:
            raise TypeError(
                f"a pipeline hands on no tensors of the dtype {t.dtype} with {t.dim()} dimensions; give images and "
                f"targets of a common dtype with at most {self._DIMENSIONS}"
            )
        pad = [0] * (self._DIMENSIONS - t.dim())
        header = torch.tensor([self._DTYPES.index(t.dtype), t.dim(), *t.shape, *pad, *t.stride(), *pad])
        for part, among in ((header, self._host), (_flat(t), group)):
            self._sent[-1].append((dist.isend(part, to, group=among), part))

    def receive(self, source: int, device: torch.device, group: _Group) -> Tensor:
        header = torch.empty(2 + 2 * self._DIMENSIONS, dtype=torch.int64)
        dist.recv(header, source, group=self._host)
        dtype, dim, *rest = header.tolist()
        shape, stride = rest[:dim], rest[self._DIMENSIONS : self._DIMENSIONS + dim]
        t = torch.empty_strided(shape, stride, dtype=self._DTYPES[dtype], device=device)
        dist.recv(_flat(t), source, group=group)
        return t


def _flat(t: Tensor) -> Tensor:
    """The memory of a dense tensor, as it lies: bytes, as no backend sends every dtype."""
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8)


def _counts(counts: Sequence[int] | bool, blocks: int, ranks: int) -> tuple[int, ...]:
    """How many blocks each rank trains."""
    if isinstance(counts, bool):
        small, more = divmod(blocks, ranks)
        counts = [small + (rank >= ranks - more) for rank in range(ranks)]
    if len(counts) != ranks or sum(counts) != blocks or min(counts) < 1:
        raise ValueError(
            f"the {blocks} local blocks are to be shared out over {ranks} ranks as {', '.join(map(str, counts))}: each "
            "rank needs one or more, and every block has to be a rank's; choose blocks or pipeline accordingly"
        )
    return tuple(counts)


def _tensors(block: LocalBlock) -> Iterator[Tensor]:
    return itertools.chain(block.parameters(), block.buffers())


def _homes(network: LocalNetwork, owner: Sequence[int]) -> dict[Tensor, int]:
    """The block that every tensor is of; raises where it is of blocks of several ranks."""
    home: dict[Tensor, int] = {}
    for j, block in enumerate(network):
        for name, t in itertools.chain(block.named_parameters(), block.named_buffers()):
            if owner[home.setdefault(t, j)] != owner[j]:
                raise ValueError(
                    f"blocks {home[t]} and {j} share {name}, which ranks {owner[home[t]]} and {owner[j]} of a pipeline "
                    "would both train; share the blocks out in another way (pipeline), or copy it"
                )
    return home


def _on_cpu(value: Any) -> Any:
    """A state with its tensors on the CPU, where any rank can have them."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value
