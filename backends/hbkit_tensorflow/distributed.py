"""Many ranks over TensorFlow's own collectives: sharded tables, and dense weights that stay equal on all ranks."""

from __future__ import annotations

import atexit
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import safetensors.numpy
import tensorflow as tf
from tensorflow.core.protobuf import tensorflow_server_pb2
from tensorflow.python.eager import context  # where TensorFlow keeps what its own strategies start collectives with

from hbkit.embedding import Collection, Sharded
from hbkit.errors import Closed, InvalidArgument, NotFound, TransportError
from hbkit.shuffle import Transport, agree, check_counts, failed, sum_over
from hbkit_tensorflow.data import ALIGN, array, tensor
from hbkit_tensorflow.nn import EmbeddingCollection

__all__ = ["GroupTransport", "broadcast", "reduce_gradients", "shard"]

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

JOBS = ("chief", "worker")  # of a cluster; in this order they are its ranks
PATIENCE = 0.85  # of a call's timeout; the rest is for asking who is lost
HEADER = 8  # bytes before those of a message: how many they are
LINGER = 0.2  # seconds before a process ends in which its last answers reach the others
SYMPTOM = re.compile(r"^Collective .*", re.MULTILINE)  # in what TensorFlow says of a failure
ABORTED = re.compile(r"hbkit: (rank \d+: .*?) \(end of the reason\)", re.DOTALL)


class _Cluster:
    """The cluster of this process: TensorFlow allows one, from its first op to its end."""

    _one: _Cluster | None = None
    _lock = threading.Lock()

    def __init__(self, resolver: Any) -> None:
        spec = resolver.cluster_spec()
        tasks = [(job, i) for job in JOBS if job in spec.jobs for i in range(spec.num_tasks(job))]
        own = (resolver.task_type, resolver.task_id)
        if own not in tasks:
            raise InvalidArgument(
                f"task {own[0]} {own[1]} is no rank of the cluster",
                remedy="TF_CONFIG names chief and worker tasks, and which of them this one is",
            )
        self.rank, self.size = tasks.index(own), len(tasks)
        self.addresses = [spec.task_address(*task) for task in tasks]
        self.tasks = [f"/job:{job}/replica:0/task:{i}" for job, i in tasks]
        self.failure = ""  # why the group ended
        self.n_channels = 0
        server = tensorflow_server_pb2.ServerDef(
            cluster=spec.as_cluster_def(), job_name=own[0], task_index=own[1], protocol=resolver.rpc_layer or "grpc"
        )
        server.default_session_config.experimental.collective_group_leader = self.tasks[0]
        try:
            context.context().configure_collective_ops(collective_leader=self.tasks[0])
        except (RuntimeError, ValueError) as e:
            raise InvalidArgument(
                f"the group of ranks cannot be made: {e}",
                remedy="make hb.distributed.GroupTransport() first, before any tensor or layer of this process",
            ) from None
        context.context().enable_collective_ops(server)
        atexit.register(time.sleep, LINGER)
        self.calls: dict[object, tuple[float, float]] = {}  # those under way: when each is late, and its timeout
        threading.Thread(target=self._watch, name="hbkit-collectives", daemon=True).start()

    def _watch(self) -> None:
        """End the group when a call is late. TensorFlow's own timeouts keep a thread each until they have passed."""
        while not self.failure:
            timeout = min((timeout for _, timeout in list(self.calls.values())), default=5.0)
            time.sleep(min(1.0, timeout / 100))
            for until, timeout in list(self.calls.values()):
                if time.monotonic() > until and not self.failure:
                    what = self.silent(timeout * (1 - PATIENCE)) or "some rank did not join"
                    self.abort(f"rank {self.rank}: {what} within {timeout:g} s")

    def silent(self, seconds: float) -> str:
        """The ranks that do not answer, in words; nothing if all do."""
        lost = ", ".join(f"rank {r} at {self.addresses[r]}" for r in self.lost(seconds))
        return lost and f"{lost} does not answer"

    @classmethod
    def of(cls, resolver: Any) -> _Cluster:
        with cls._lock:
            if cls._one is None:
                resolver = resolver or tf.distribute.cluster_resolver.TFConfigClusterResolver()
                if not resolver.cluster_spec().jobs:
                    raise NotFound("no cluster of ranks", remedy="set TF_CONFIG, as tf.distribute wants it")
                cls._one = cls(resolver)
            return cls._one

    def lost(self, seconds: float) -> list[int]:
        """Ranks that do not answer, which are asked one after the other: TensorFlow holds Python's lock meanwhile."""
        lost, until = [], time.monotonic() + seconds
        peers = [rank for rank in range(self.size) if rank != self.rank]
        for i, rank in enumerate(peers):
            left = max(0.01, (until - time.monotonic()) / (len(peers) - i))
            try:
                context.context().check_collective_ops_peer_health(self.tasks[rank], round(left * 1000))
            except tf.errors.OpError:
                lost.append(rank)
        return lost

    def abort(self, reason: str) -> None:
        self.failure = self.failure or reason
        context.context().abort_collective_ops(tf.errors.ABORTED, f"hbkit: {reason} (end of the reason)")


def _n_words(nbytes: int) -> int:
    """Words of 4 bytes of a message of so many: rounded up, since the ranks meet over each size when it is new."""
    words = -(-(HEADER + nbytes) // 4)
    step = max(256, 1 << max(0, words.bit_length() - 6))
    return -(-words // step) * step


def _words(data: Bytes) -> tf.Tensor:
    """A message as the int32 that TensorFlow's collectives carry."""
    n, end = _n_words(len(data)) * 4, HEADER + len(data)
    room = np.empty(n + ALIGN, np.uint8)
    room = room[-room.ctypes.data % ALIGN :][:n]
    room[:HEADER].view(np.int64)[0] = len(data)
    room[HEADER:end] = data
    room[end:] = 0
    return tensor(room.view(np.int32))


class GroupTransport:
    """A `hbkit.shuffle.Transport` over the collectives of a TensorFlow cluster; each process is a rank.

    Parameters
    ----------
    group : tf.distribute.cluster_resolver.ClusterResolver, optional
        Its chief and its workers, in this order, are the ranks; as ``TF_CONFIG`` says when left out.
    timeout : float, seconds
        After which a call that other ranks do not join raises.

    Raises
    ------
    NotFound
        There is no ``TF_CONFIG``.
    InvalidArgument
        This task is no rank of it; or TensorFlow has run an op already: collectives are its first thing to start.

    Notes
    -----
    A process has one group, for good: once a call failed, all further ones fail with its reason.

    Bytes travel as int32 between each two ranks, a broadcast in a group of two. Each size is a collective of its own to
    TensorFlow, about whose first use it asks the chief, and which it keeps a record of: messages are rounded up to a
    multiple of 1 KiB, or of a power of two that is at most a 32nd of them.
    """

    def __init__(self, group: Any = None, timeout: float = 60.0) -> None:
        self._cluster = cluster = _Cluster.of(group)
        self.rank, self.size, self.timeout = cluster.rank, cluster.size, timeout
        self._channel, cluster.n_channels = cluster.n_channels, cluster.n_channels + 1
        self._closed = False
        self._peers = [r for r in range(self.size) if r != self.rank]
        self._device = f"{cluster.tasks[self.rank]}/device:CPU:0"
        words, numbers = tf.TensorSpec([None], tf.int32), tf.TensorSpec([self.size - 1], tf.int32)
        signature = [[words] * (self.size - 1), numbers, numbers]
        self._swap = tf.function(self._swap_graph, autograph=False, input_signature=signature)

    def _key(self, source: int, target: int) -> int:
        """Of the TensorFlow group of two that carries what one rank sends another."""
        return 1 + (self._channel * self.size + source) * self.size + target

    def _swap_graph(self, sent: list[Any], n_sent: Any, n_got: Any) -> list[Any]:
        with tf.device(self._device):
            sends = [
                tf.raw_ops.CollectiveBcastSendV2(
                    input=words,
                    group_size=2,
                    group_key=self._key(self.rank, peer),
                    instance_key=n_sent[i],
                )
                for i, (peer, words) in enumerate(zip(self._peers, sent, strict=True))
            ]
            got = [
                tf.raw_ops.CollectiveBcastRecvV2(
                    group_size=2,
                    group_key=self._key(peer, self.rank),
                    instance_key=n_got[i],
                    shape=n_got[i : i + 1],
                    T=tf.int32,
                )
                for i, peer in enumerate(self._peers)
            ]
            with tf.control_dependencies(sends):
                return [tf.identity(words) for words in got]

    def all_to_all(self, data: Bytes, counts: Int64s, expected: Int64s | None = None) -> tuple[Bytes, Int64s]:
        """See `hbkit.shuffle.Transport`."""
        counts = check_counts(data, counts, self.size)
        if expected is None:
            sizes = self._exchange(list(counts.view(np.uint8).reshape(self.size, -1)), [counts.itemsize] * self.size)
            expected = np.concatenate(sizes).view(np.int64)
        expected = np.asarray(expected, np.int64)
        got = self._exchange(np.split(data, np.cumsum(counts)[:-1]), expected.tolist())
        return np.concatenate(got), expected

    def all_gather(self, data: bytes) -> list[bytes]:
        """See `hbkit.shuffle.Transport`."""
        part = np.frombuffer(data, np.uint8)
        got, counts = self.all_to_all(np.tile(part, self.size), np.full(self.size, len(part)))
        return [got[end - n : end].tobytes() for n, end in zip(counts, np.cumsum(counts), strict=True)]

    def _exchange(self, parts: list[Bytes], expected: list[int]) -> list[Bytes]:
        """One message to and from each other rank."""
        if self.size == 1:
            return parts
        sent = [_words(parts[peer]) for peer in self._peers]
        n_sent = np.array([len(words) for words in sent], np.int32)
        n_got = np.array([_n_words(expected[peer]) for peer in self._peers], np.int32)
        got = self._call(self._swap, sent, tf.constant(n_sent), tf.constant(n_got))
        came = list(parts)
        for peer, words in zip(self._peers, got, strict=True):
            message = array(words).view(np.uint8)
            n = int(message[:HEADER].view(np.int64)[0])
            if n != expected[peer]:
                reason = f"rank {peer} sent {n} bytes where rank {self.rank} expected {expected[peer]}"
                self._cluster.abort(reason)
                raise self._error()
            came[peer] = message[HEADER : HEADER + n]
        return came

    def _call(self, graph: Any, *inputs: Any) -> Any:
        if self._closed:
            raise Closed("the channel is closed", rank=self.rank, remedy="make a new one, or split another")
        if self._cluster.failure:
            raise self._error()
        self._cluster.calls[call := object()] = time.monotonic() + self.timeout * PATIENCE, self.timeout
        try:
            return graph(*inputs)
        except tf.errors.OpError as e:
            self._failed(e)
            raise self._error() from e
        finally:
            del self._cluster.calls[call]

    def _failed(self, e: tf.errors.OpError) -> None:
        """Find out why, and end the group."""
        cluster = self._cluster
        if told := ABORTED.search(e.message):
            reason = told[1]
        else:
            what = cluster.silent(self.timeout * (1 - PATIENCE)) or " ".join(SYMPTOM.findall(e.message)) or e.message
            reason = f"rank {self.rank}: {what}"
        cluster.abort(reason)

    def _error(self) -> TransportError:
        return failed(f"the exchange ended: {self._cluster.failure}", self.rank)

    def split(self) -> GroupTransport:
        """Another channel over the same ranks; all of them must call it, in the same order."""
        return GroupTransport(timeout=self.timeout)

    def abort(self, reason: str) -> None:
        """See `hbkit.shuffle.Transport`: ranks that wait for this one learn of it at once, others when they next do."""
        self._cluster.abort(f"rank {self.rank}: {reason}")

    def close(self) -> None:
        """See `hbkit.shuffle.Transport`. TensorFlow's cluster lives as long as the process."""
        self._closed = True


def shard(
    embeddings: EmbeddingCollection | Collection,
    group: Any = None,
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
    collection = getattr(embeddings, "collection", embeddings)
    transport = group if hasattr(group, "all_to_all") else GroupTransport(group, timeout)
    return EmbeddingCollection(Sharded(collection, transport, wire, placement, feedback))


def broadcast(model: keras.Model, embeddings: Any) -> None:
    """Give every rank the weights that the model has on rank 0.

    Nothing is done where the embeddings are not sharded.

    Raises
    ------
    SchemaMismatch
        The ranks' models have other weights or shapes.
    TransportError
        A rank is lost or late.
    """
    transport: Transport | None = getattr(getattr(embeddings, "collection", embeddings), "transport", None)
    if transport is None:
        return
    weights = {f"{i} {weight.path}": weight for i, weight in enumerate(model.weights)}
    agree(transport, {name: f"{weight.dtype}{list(weight.shape)}" for name, weight in weights.items()}, "the model")
    own = {name: np.array(array(weight.value)) for name, weight in weights.items()} if transport.rank == 0 else {}
    first = safetensors.numpy.load(transport.all_gather(safetensors.numpy.save(own))[0])
    for name, weight in weights.items():
        weight.assign(first[name])


def reduce_gradients(grads: Sequence[Any], step: Any) -> list[Any]:
    """Gradients of the loss's mean over all ranks' rows, from each rank's own.

    They are given back as they are where the step's embeddings are not sharded.

    Parameters
    ----------
    grads : sequence of Tensor or None
        As ``tape.gradient(loss, model.trainable_variables)`` gives them, alike on all ranks. Any other tensor may be
        among them, such as the loss itself.
    step : Step
        Its loss was the mean over its own rows, by their weight.

    Raises
    ------
    TransportError
        A rank is lost, late or aborted.
    """
    if step.transport is None:
        return list(grads)
    own = [tf.convert_to_tensor(grad) for grad in grads if grad is not None]
    flat = np.concatenate([array(tf.cast(grad, tf.float32)).reshape(-1) for grad in own])
    flat = flat * np.float32(step.share) if step.share else np.zeros_like(flat)  # the mean over no rows may be NaN
    total = sum_over(step.transport, flat)
    parts = np.split(total, np.cumsum([int(tf.size(grad)) for grad in own])[:-1])
    found = (tf.cast(tensor(part.reshape(grad.shape)), grad.dtype) for part, grad in zip(parts, own, strict=True))
    return [None if grad is None else next(found) for grad in grads]
