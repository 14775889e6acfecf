"""Ranks as processes, which a server that has imported TensorFlow forks, and what tests have them do."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

import hbkit.tensorflow as hb
from hbkit import embedding
from hbkit.shuffle import sum_over

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hbkit.tensorflow"])


class Ended(NamedTuple):
    """How a rank ended: what it returned or raised; neither, where it was killed."""

    value: Any = None
    error: str = ""


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _rank(act, args, rank, ports, pipe):
    cluster = {"chief": [f"127.0.0.1:{ports[0]}"], "worker": [f"127.0.0.1:{port}" for port in ports[1:]]}
    task = {"type": "worker", "index": rank - 1} if rank else {"type": "chief", "index": 0}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    tf.config.threading.set_intra_op_parallelism_threads(1)
    try:
        ended = Ended(act(*args))
    except Exception as e:
        ended = Ended(error=f"{type(e).__name__}: {e}")
    pipe.send(ended)
    pipe.close()
    time.sleep(0.5)  # what this rank has sent last may be under way
    os._exit(0)


def run(act, size, *args, lost=None, limit=120.0):
    """What `act` came to on each rank. A rank that has not ended after `limit` seconds is killed.

    So is rank `lost`, once the others have ended.
    """
    ports, ranks = free_ports(size), []
    for rank in range(size):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_rank, args=(act, args, rank, ports, theirs))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    ended, until = [], time.monotonic() + limit
    try:
        for rank, (_, ours) in sorted(enumerate(ranks), key=lambda r: r[0] == lost):
            wait([ours], 0.0 if rank == lost else max(0.0, until - time.monotonic()))
            try:
                ended.append((rank, ours.recv() if ours.poll() else Ended()))
            except EOFError:
                ended.append((rank, Ended()))
        time.sleep(0.6)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return [how for _, how in sorted(ended)]


def exchange(transport, seed):
    """Random parts between all ranks on two channels at once; whether all that came is what was sent."""
    rank, size, other, good = transport.rank, transport.size, transport.split(), []

    def go(channel, seed):
        for told in (False, True):
            rng = np.random.default_rng(seed)  # the same on all ranks
            n = rng.integers(0, 5, (size, size)) * rng.integers(0, 20000, (size, size))
            data = [rng.integers(0, 256, c.sum()).astype(np.uint8) for c in n]
            out, came = channel.all_to_all(data[rank], n[rank], n[:, rank] if told else None)
            parts = [np.split(d, np.cumsum(c)[:-1])[rank] for d, c in zip(data, n, strict=True)]
            good.append(came.tolist() == n[:, rank].tolist() and np.array_equal(out, np.concatenate(parts)))
        good.append(channel.all_gather(b"x" * rank) == [b"x" * r for r in range(size)])

    thread = threading.Thread(target=go, args=(other, seed + 1))
    thread.start()
    go(transport, seed)
    thread.join()
    total = sum_over(transport, np.arange(7, dtype=np.float32) * rank)
    good.append(np.array_equal(total, np.arange(7) * sum(range(size))))
    other.close()
    return len(good) == 7 and all(good)


def lose(how, lost, timeout):
    """Exchange on two channels until rank `lost` is; seconds it took, and the errors of both threads."""
    transport = hb.distributed.GroupTransport(timeout=timeout)
    other, errors = transport.split(), []
    transport.all_gather(b"")  # all are here
    struck = time.monotonic() + 0.5

    def go(channel):
        try:
            while True:
                channel.all_to_all(np.zeros(transport.size * 1000, np.uint8), np.full(transport.size, 1000))
        except Exception as e:
            errors.append(f"{type(e).__name__}: {e}")

    if transport.rank == lost:
        threading.Timer(0.5, strike, (how, transport)).start()
    thread = threading.Thread(target=go, args=(other,), daemon=True)
    thread.start()
    go(transport)
    thread.join()
    return time.monotonic() - struck, errors


def strike(how, transport):
    if how == "abort":
        transport.abort("ValueError: the reason")
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


# --- training ---------------------------------------------------------------------------------------------------

FEATURES = {"user": "user", "item": "item", "tags": "tag"}
KEYS = np.concatenate([np.arange(100), np.arange(100) + 10**12])


def click_columns(n_rows, seed=0):
    """Users and items with planted weights, up to three tags, two dense columns, weights."""
    rng, planted = np.random.default_rng(seed), np.random.default_rng(99).normal(0, 1.5, (2, 100))
    user, item = rng.zipf(1.3, (2, n_rows)) % 100
    logit = planted[0, user] + planted[1, item]
    return {
        "click": (rng.random(n_rows) < 1 / (1 + np.exp(-logit))).astype(np.float32),
        "importance": rng.integers(1, 4, n_rows).astype(np.float32),
        "amount": rng.lognormal(2, 1, n_rows).astype(np.float32),
        "age": rng.integers(18, 70, n_rows).astype(np.float32),
        "user": user,
        "item": item + 10**12,
        "tags": [rng.integers(0, 30, n).tolist() for n in rng.integers(0, 4, n_rows)],
    }


def write_parts(folder, size, batch, rounds, seed=0):
    """A file for each rank, of which later ones end earlier; and ``whole``, of what all have in each round.

    In ``whole``, rows that weigh nothing stand where a rank has none.
    """
    whole = click_columns(rounds * size * batch, seed)
    weight = whole["importance"].reshape(rounds, size, batch)
    for rank in range(1, size):
        flat = weight[:, rank].reshape(-1).copy()
        flat[len(flat) - rank * (2 * batch + 3) :] = 0
        weight[:, rank] = flat.reshape(rounds, batch)
    table = pa.table(whole)
    rows = np.arange(table.num_rows).reshape(rounds, size, batch)
    pq.write_table(table, folder / "whole")
    for rank in range(size):
        mine = rows[:, rank].reshape(-1)
        pq.write_table(table.take(mine[whole["importance"][mine] > 0]), folder / f"{rank}", row_group_size=100)


def dataset(path, batch):
    names = ["click", "importance", "amount", "age", *FEATURES]
    return hb.data.Dataset.from_parquet(str(path), fields=names).supervised("click", "importance").batch(batch)


def trainer_of(transport, wire="float32", optimizer="SGD", lr=0.1, **options):
    """A trainer of a small model, whose tables all ranks share where there is a transport."""
    rule = getattr(embedding, optimizer)(lr=lr)
    tables = [
        embedding.Table(name, 8, optimizer=rule, initializer=embedding.Normal(0, 0.1, seed=0))
        for name in FEATURES.values()
    ]
    embeddings = embedding.Collection(tables, FEATURES, {"tags": "mean"})
    keras.utils.set_random_seed(0 if transport is None else transport.rank)  # those of rank 0 count
    model = hb.models.DLRM(list(FEATURES), 8, n_dense=2, bottom=(16,), top=(16,))
    if transport is not None:
        embeddings = hb.distributed.shard(embeddings, transport.split(), wire)
    return hb.training.Trainer(model, embeddings, optimizer="sgd", lr=0.1, **options)


def state_of(trainer):
    """Dense weights; and by table how many rows are here, and the rows of all keys, zeros where absent."""
    rows = {name: (len(t), t.lookup(KEYS)) for name, t in trainer.collection.tables.items()}
    return [np.array(weight) for weight in trainer.model.get_weights()], rows


def trained(transport, folder, batch, **options):
    """Train on this rank's file; the state, the losses, and the AUC of what all ranks read."""
    trainer, losses, auc = trainer_of(transport, **options), [], hb.metrics.AUC()
    data = dataset(folder / f"{transport.rank}", batch)
    trainer.fit(data, lambda n, loss: losses.append(loss))
    for label, probability, weight in trainer.predict(data):
        auc.update(label, probability, weight)
    return *state_of(trainer), losses, auc.reduce(transport).result()


def train(folder, batch, runs):
    """What `exchange` finds, and what training comes to for the options of each run."""
    transport = hb.distributed.GroupTransport(timeout=60)
    return exchange(transport, 7), [trained(transport, folder, batch, **options) for options in runs]
