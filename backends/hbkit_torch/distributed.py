"""Many ranks over `torch.distributed`: the exchange between them, sharded tables, equal dense weights and gradients."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hbkit import errors
from hbkit.embedding import Collection, Sharded
from hbkit.shuffle import Transport, agree, check_counts, failed, sum_over
from hbkit_torch.nn import EmbeddingCollection

__all__ = ["GroupTransport", "broadcast", "reduce_gradients", "shard"]

GRACE = 2.0  # seconds that ranks have to say that they live, once an exchange failed; an eighth of a short timeout
STORE_LOST = "the group's store is lost too, which rank 0 keeps, or else torchrun's agent"
Array = np.ndarray[Any, Any]


class GroupTransport:
    """A `hbkit.shuffle.Transport` over a process group of torch, on channels (groups of torch) of its own.

    Every rank of the group makes it, in the same order as other groups.

    Parameters
    ----------
    group : ProcessGroup, optional
        The default group when left out; where there is none yet, it is made over Gloo from the environment that
        ``torchrun`` sets. Over NCCL, bytes are staged through the current CUDA device.
    timeout : float, seconds
        A call that others do not join raises within this time.

    Attributes
    ----------
    rank, size : int
    timeout : float, seconds

    Raises
    ------
    InvalidArgument
        This process is not in the group.
    TransportError
        A rank did not come.

    Notes
    -----
    Gloo is tested, NCCL and MPI are not.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 60.0) -> None:
        if not dist.is_initialized():
            if "RANK" not in os.environ:
                raise errors.InvalidArgument(
                    "there is no process group",
                    remedy="start the ranks with torchrun, or call init_process_group first",
                )
            _start(timeout)
        if dist.get_rank(group) < 0:
            raise errors.InvalidArgument(
                f"process {dist.get_rank()} is not in the group", remedy="call it in the group's processes only"
            )
        self._join(_Members(group, timeout))

    def _join(self, members: _Members) -> None:
        self.rank, self.size, self.timeout = members.rank, members.size, members.timeout
        self._members, self._n_calls = members, 0
        self._channel: dist.ProcessGroup | None = members.open()

    def all_to_all(self, data: Array, counts: Array, expected: Array | None = None) -> tuple[Array, Array]:
        """See `hbkit.shuffle.Transport.all_to_all`."""
        counts = check_counts(data, counts, self.size)
        if expected is None:
            eight = np.full(self.size, counts.itemsize)
            came = self._exchange(counts.view(np.uint8), eight, eight).view(np.int64)
        else:
            came = np.asarray(expected, np.int64)
        return self._exchange(data, counts, came), came

    def _exchange(self, data: Array, counts: Array, came: Array) -> Array:
        if self._channel is None:
            raise errors.Closed("the channel is closed", rank=self.rank, remedy="make a new transport")
        self._n_calls += 1
        with self._members.meeting(f"call {self._n_calls} of a channel, with {len(data):,} bytes"):
            sent = torch.from_numpy(np.require(data, np.uint8, ["C", "W"])).to(self._members.device)
            out = torch.empty(int(came.sum()), dtype=torch.uint8, device=sent.device)
            dist.all_to_all_single(out, sent, came.tolist(), counts.tolist(), group=self._channel)
        return out.cpu().numpy()

    def all_gather(self, data: bytes) -> list[bytes]:
        """See `hbkit.shuffle.Transport.all_gather`."""
        sent = np.tile(np.frombuffer(data, np.uint8), self.size)
        got, came = self.all_to_all(sent, np.full(self.size, len(data)))
        return [part.tobytes() for part in np.split(got, np.cumsum(came)[:-1])]

    def split(self) -> GroupTransport:
        """See `hbkit.shuffle.Transport.split`."""
        other = GroupTransport.__new__(GroupTransport)
        other._join(self._members)
        return other

    def abort(self, reason: str) -> None:
        """See `hbkit.shuffle.Transport.abort`.

        A rank that computes learns of it at its next call, and one that waits for such a rank when that rank learns.
        """
        self._members.end(f"rank {self.rank}: {reason}")

    def close(self) -> None:
        """See `hbkit.shuffle.Transport.close`."""
        if self._channel is not None:
            self._members.leave(self._channel)
            self._channel = None


class _Members:
    """What the channels over one process group share: their ranks, and how they end.

    Gloo tells a rank that a connection broke, but not whose, and breaks none where a rank merely raises. So a rank
    whose call failed closes all its channels (by a receive that nobody answers, given up at once: the engine has no
    other way), which fails the others' calls; then all say in the group's store that they live. Who does not is named.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        self._grace = min(GRACE, timeout / 8)
        backend = dist.get_backend(group)
        self._backend = backend if backend in ("nccl", "mpi") else "gloo"
        self.device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        self._ranks = dist.get_process_group_ranks(group)
        self._local = self.size < dist.get_world_size()  # processes that are no members do not take part
        self._channels: list[dist.ProcessGroup] = []
        self._store: Any = None  # torch's, of the first channel
        self._lock = threading.Lock()
        self._reason = ""

    def open(self) -> dist.ProcessGroup:
        """A new channel; collective."""
        with self.meeting("a new channel"):
            channel = dist.new_group(
                self._ranks,
                timedelta(seconds=self.timeout - 3 * self._grace),  # there must be time to ask who is lost
                self._backend,
                use_local_synchronization=self._local,
            )
        assert isinstance(channel, dist.ProcessGroup)
        self._channels.append(channel)
        if self._store is None:
            self._store = dist.distributed_c10d._get_process_group_store(channel)  # the name of it since torch 2.6
        return channel

    def leave(self, channel: dist.ProcessGroup) -> None:
        """Close one channel."""
        self._channels.remove(channel)
        if not self._local:  # there torch would give its name, and in the store its addresses, to the next one
            dist.destroy_process_group(channel)

    @contextmanager
    def meeting(self, what: str) -> Generator[None]:
        """A call of all ranks: whatever the engine raises in it ends the group, by a TransportError."""
        if not self._reason:
            try:
                yield
            except RuntimeError as e:  # torch's errors all derive from it
                text = re.sub(r"^\[\S+\] ", "", str(e)).split(". ")[0]
                self.end("", f"{text}, in {what}")
            else:
                return
        raise failed(f"the exchange was aborted: {self._reason}", self.rank)

    def end(self, reason: str, symptom: str = "") -> None:
        """Close all channels, and agree on the reason: that of the first rank that gave one, else whoever is silent."""
        with self._lock:
            if self._reason:
                return
            found: list[str] = []
            stands = threading.Event()
            asking = threading.Thread(target=self._ask, args=(reason, symptom, found, stands), daemon=True)
            asking.start()
            if reason:
                stands.wait(self._grace)  # before others look for it
            for channel in self._channels:
                self._cut(channel)
            asking.join(2 * self._grace)
            self._reason = found[0] if found else f"{symptom or reason}; {STORE_LOST}"

    def _ask(self, reason: str, symptom: str, found: list[str], stands: threading.Event) -> None:
        """Agree on the reason through the store: on a thread, as the process that keeps it may be the lost one."""
        if self._store is None:  # the first channel did not come about
            found.append(reason or symptom)
            return
        told = others = [r for r in range(self.size) if r != self.rank]
        try:
            self._store.set(f"alive/{self.rank}", "")
            if not reason:
                silent = self._without("alive", others)
                told = [r for r in others if self._store.check([f"alive/{r}"])]
                lost = f"no sign of life from rank {', '.join(map(str, silent))} " if silent else ""
                reason = f"{lost}(rank {self.rank}: {symptom})"
            found.append(self._store.compare_set("reason", "", reason).decode())
            stands.set()
            self._store.set(f"told/{self.rank}", "")
            self._without("told", told)  # this process may be the one that keeps the store: it stays until all know
        except RuntimeError:  # the store is gone
            if not found and reason:
                found.append(reason)

    def _without(self, key: str, ranks: list[int]) -> list[int]:
        """Those of the ranks that have not set the key within the time that they have to; none once a reason stands."""
        until = time.monotonic() + self._grace
        while ranks and time.monotonic() < until:
            if key == "alive" and self._store.check(["reason"]):
                return []
            ranks = [r for r in ranks if not self._store.check([f"{key}/{r}"])]
            time.sleep(0.02)
        return ranks

    def _cut(self, channel: dist.ProcessGroup) -> None:
        if self._backend != "gloo":
            channel.abort()
        elif self.size > 1:
            with suppress(RuntimeError):
                nothing = dist.irecv(torch.empty(1), group=channel, group_src=(self.rank + 1) % self.size, tag=1)
                if nothing is not None:
                    nothing.wait(timedelta(milliseconds=1))


def _start(timeout: float) -> None:
    """Make the default group.

    torchrun's agent keeps one store over its restarts, in which ranks would find the addresses of those before them:
    so rank 0 names this start, and the others answer to the name until it says that it has heard them.
    """
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    me, until = uuid.uuid4().hex, time.monotonic() + timeout
    if rank == 0:
        name = me
        store.set("hbkit/start", name)
        answers = [store.get(f"{name}/{r}").decode() for r in range(1, size)]
        store.set(f"{name}/heard", json.dumps(answers))
    else:
        heard: list[str] = []
        while me not in heard:
            if time.monotonic() > until:
                raise failed("rank 0 did not start", rank, peer=0)
            name = store.get("hbkit/start").decode()
            store.set(f"{name}/{rank}", me)
            time.sleep(0.02)
            heard = json.loads(store.get(f"{name}/heard")) if store.check([f"{name}/heard"]) else []
    group = PrefixStore(name, store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


def shard(
    embeddings: EmbeddingCollection | Collection,
    group: dist.ProcessGroup | Transport | None = None,
    wire: str = "float32",
    timeout: float = 60.0,
    placement: Mapping[str, Any] | None = None,
    feedback: int = 0,
) -> EmbeddingCollection:
    """The embeddings, their tables divided by key over the ranks of a group; each rank has the rows that it owns.

    Parameters
    ----------
    embeddings : EmbeddingCollection or hbkit.embedding.Collection
        Made alike on every rank, with tables of no rows, or those that `hbkit.snapshot.load` gave this rank.
    group, timeout
        As `GroupTransport` takes them; or any `hbkit.shuffle.Transport`.
    wire : "float32", "float16", "bfloat16" or "int8"
        What rows and their gradients travel as.
    placement, feedback
        As `hbkit.embedding.Sharded` takes them.

    Raises
    ------
    SchemaMismatch
        Ranks differ in tables, features, wire or placement.
    TransportError
        A rank is lost or late.
    """
    collection: Any = getattr(embeddings, "collection", embeddings)
    transport: Any = group if hasattr(group, "all_to_all") else GroupTransport(group, timeout)
    return EmbeddingCollection(Sharded(collection, transport, wire, placement, feedback))


def broadcast(model: torch.nn.Module, embeddings: Any) -> None:
    """Give every rank the parameters and buffers that the model has on rank 0, in place.

    Nothing is done where the embeddings are not sharded.

    Raises
    ------
    SchemaMismatch
        The ranks' models have other parameters or shapes.
    TransportError
        A rank is lost or late.
    """
    transport = getattr(getattr(embeddings, "collection", embeddings), "transport", None)
    if transport is None:
        return
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    agree(transport, {name: f"{value.dtype}{list(value.shape)}" for name, value in state.items()}, "the model")
    sent = safetensors.torch.save(state) if transport.rank == 0 else b""
    model.load_state_dict(safetensors.torch.load(transport.all_gather(sent)[0]))


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], step: Any) -> None:
    """Make each parameter's ``grad`` that of the loss's mean over all ranks' rows, after ``backward()``.

    In place; nothing is done where the step's embeddings are not sharded. A parameter that had no gradient on any rank
    keeps none.

    Parameters
    ----------
    parameters : iterable of Parameter
        The same on all ranks, in the same order.
    step : Step
        Its loss was the mean over its own rows, by their weight.

    Raises
    ------
    TransportError
        A rank is lost, late or aborted.
    """
    if step.transport is None:
        return
    trained = [p for p in parameters if p.requires_grad]
    used = np.array([p.grad is not None for p in trained], np.float32)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([g.detach().reshape(-1).float().cpu() for g in grads])
    flat = flat * step.share if step.share else torch.zeros_like(flat)  # the mean over no rows may be NaN
    total = sum_over(step.transport, np.concatenate([flat.numpy(), used]))
    parts = torch.from_numpy(total[: len(flat)]).split([p.numel() for p in trained])
    for p, part, n in zip(trained, parts, total[len(flat) :], strict=True):
        if n:
            p.grad = part.view_as(p).to(p.device, p.dtype)
