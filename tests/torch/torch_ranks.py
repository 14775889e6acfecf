"""Ranks as processes, which a server that has imported torch forks, and what tests have them do."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import hbkit.torch as hb
from hbkit import embedding, errors
from hbkit.shuffle import sum_over

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hbkit.torch"])


class Ended(NamedTuple):
    """How a rank ended: what it returned or raised; neither, where it was killed."""

    value: Any = None
    error: str = ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(act, args, rank, size, port, pipe):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        ended = Ended(act(*args))
    except Exception as e:
        ended = Ended(error=f"{type(e).__name__}: {e}")
    pipe.send(ended)
    pipe.close()
    os._exit(0)  # torch's own threads may wait for ranks that are lost


def run(act, size, *args, lost=None, limit=60.0):
    """What `act` came to on each rank. A rank that has not ended after `limit` seconds is killed.

    So is rank `lost`, once the others have ended.
    """
    port, ranks = free_port(), []
    for rank in range(size):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_rank, args=(act, args, rank, size, port, theirs))
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
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    return [how for _, how in sorted(ended)]


def exchange(seed):
    """Random parts between all ranks on two channels at once; what came, compared with what was sent."""
    transport = hb.distributed.GroupTransport(timeout=20)
    rank, size, other = transport.rank, transport.size, transport.split()

    def go(channel, seed):
        for told in (False, True):
            rng = np.random.default_rng(seed)  # the same on all ranks
            n = rng.integers(0, 5, (size, size)) * rng.integers(0, 20000, (size, size))
            data = [rng.integers(0, 256, c.sum()).astype(np.uint8) for c in n]
            out, came = channel.all_to_all(data[rank], n[rank], n[:, rank] if told else None)
            parts = [np.split(d, np.cumsum(c)[:-1])[rank] for d, c in zip(data, n, strict=True)]
            good.append(came.tolist() == n[:, rank].tolist() and np.array_equal(out, np.concatenate(parts)))
        good.append(channel.all_gather(b"x" * rank) == [b"x" * r for r in range(size)])

    good = []
    thread = threading.Thread(target=go, args=(other, seed + 1))
    thread.start()
    go(transport, seed)
    thread.join()
    total = sum_over(transport, np.arange(7, dtype=np.float32) * rank)
    good.append(np.array_equal(total, np.arange(7) * sum(range(size))))
    for _ in range(3):  # channels that come and go
        other.close()
        other.close()
        other = transport.split()
        good.append(other.all_gather(b"y") == [b"y"] * size)
    transport.close()
    return len(good) == 10 and all(good)


def lose(how, lost, timeout):
    """Exchange on two channels until rank `lost` is; seconds it took, and the errors of both threads."""
    transport = hb.distributed.GroupTransport(timeout=timeout)
    other, found = transport.split(), []

    def go(channel):
        try:
            while True:
                channel.all_to_all(np.zeros(transport.size * 1000, np.uint8), np.full(transport.size, 1000))
        except Exception as e:
            found.append(f"{type(e).__name__}: {e}")

    thread = threading.Thread(target=go, args=(other,), daemon=True)
    if transport.rank == lost:
        threading.Timer(0.3, strike, (how, transport)).start()
    began = time.monotonic()
    thread.start()
    go(transport)
    thread.join()
    return time.monotonic() - began, found


def strike(how, transport):
    if how == "abort":
        transport.abort("ValueError: the reason")
    else:
        if how == "node":  # torchrun's agent first
            os.kill(os.getppid(), signal.SIGKILL)
            how = "kill"
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


# --- training ---------------------------------------------------------------------------------------------------

FEATURES = {"user": "user", "item": "item", "tags": "tag"}
KEYS = np.concatenate([np.arange(100), np.arange(100) + 10**12])
ROUNDS = 100


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


def write_parts(folder, size, batch, rounds=ROUNDS, seed=0):
    """A file for each rank, of which later ones end earlier; and ``whole``, of what all have in each round.

    In ``whole``, copies of its first row that weigh nothing stand where a rank has no row.
    """
    whole = click_columns(rounds * size * batch, seed)
    whole["importance"] = whole["importance"].reshape(rounds, size, batch)
    for rank in range(1, size):
        flat = whole["importance"][:, rank].reshape(-1).copy()
        flat[len(flat) - rank * (2 * batch + 3) :] = 0
        whole["importance"][:, rank] = flat.reshape(rounds, batch)
    whole["importance"] = whole["importance"].reshape(-1)
    filled = np.where(whole["importance"] > 0, np.arange(len(whole["importance"])), 0)
    table = pa.table(whole)
    rows = np.arange(table.num_rows).reshape(rounds, size, batch)
    pq.write_table(table.take(filled).set_column(1, "importance", [whole["importance"]]), folder / "whole")
    for rank in range(size):
        mine = rows[:, rank].reshape(-1)
        pq.write_table(table.take(mine[whole["importance"][mine] > 0]), folder / f"{rank}", row_group_size=100)


def dataset(path, batch, shard=(0, 1)):
    names = ["click", "importance", "amount", "age", *FEATURES]
    ds = hb.data.Dataset.from_parquet(str(path), fields=names, shard=shard)
    return ds.supervised("click", "importance").batch(batch)


def trainer_of(transport, wire="float32", optimizer="SGD", lr=0.1):
    """A trainer of a small model, whose tables all ranks share where there is a transport."""
    rule = getattr(embedding, optimizer)(lr=lr)
    tables = [
        embedding.Table(name, 8, optimizer=rule, initializer=embedding.Normal(0, 0.1, seed=0))
        for name in FEATURES.values()
    ]
    embeddings = embedding.Collection(tables, FEATURES, {"tags": "mean"})
    torch.manual_seed(0 if transport is None else transport.rank)  # those of rank 0 count
    model = hb.models.DLRM(list(FEATURES), 8, n_dense=2)
    if transport is not None:
        embeddings = hb.distributed.shard(embeddings, transport, wire)
    return hb.training.Trainer(model, embeddings, optimizer="sgd", lr=0.1)


def state_of(trainer):
    """Dense parameters by name; and by table how many rows are here, and the rows of all keys, zeros where absent."""
    dense = {name: value.numpy().copy() for name, value in trainer.model.state_dict().items()}
    rows = {name: (len(t), t.lookup(KEYS)) for name, t in trainer.collection.tables.items()}
    return dense, rows


def train(folder, batch, wire="float32", optimizer="SGD", lr=0.1):
    """Train on this rank's file; its state, and the AUC of all ranks' parts of the test file."""
    transport = hb.distributed.GroupTransport(timeout=20)
    trainer = trainer_of(transport, wire, optimizer, lr)
    trainer.fit(dataset(folder / f"{transport.rank}", batch))
    auc = hb.metrics.AUC()
    for label, probability, weight in trainer.predict(dataset(folder / f"{transport.rank}", batch)):
        auc.update(label, probability, weight)
    return *state_of(trainer), auc.reduce(transport).result()


def go_on(folder, batch, model):
    """Load what is saved in `model`, if anything is, train on this rank's file and save; the state."""
    transport = hb.distributed.GroupTransport(timeout=20)
    trainer = trainer_of(transport)
    if model.exists():
        trainer.load(model)
    trainer.fit(dataset(folder / f"{transport.rank}", batch))
    trainer.save(model)
    return state_of(trainer)


def share_out(path, batch, model, every, how="", lost=-1, at=-1, timeout=20.0):
    """Train on this rank's part of one file, from where `model` stands, and save there every so many steps; the state.

    Rank `lost` is lost within step `at`, between its forward and its backward; then what the others raise, and after
    how many seconds.
    """
    transport = hb.distributed.GroupTransport(timeout=timeout)
    trainer = trainer_of(transport)
    ds = dataset(path, batch, (transport.rank, transport.size))
    if model.exists():
        trainer.load(model, ds)
    steps = [time.monotonic()]

    def on_step(n_rows, loss):
        steps.append(time.monotonic())
        if (len(steps) - 1) % every == 0:
            trainer.save(model)

    def on_forward(*_):
        if transport.rank == lost and len(steps) == at:
            strike(how, transport)

    trainer.model.register_forward_hook(on_forward)
    try:
        trainer.fit(ds, on_step)
    except errors.TransportError as e:
        return time.monotonic() - steps[-1], str(e)
    return state_of(trainer)


if __name__ == "__main__":  # a rank of torchrun, which on the first attempt may be lost, or its node
    _path, _batch, _model, _every, _how, _out = sys.argv[1:]
    _rank = int(os.environ["RANK"])
    _first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    _here = _first and (_how == "node" or (_how == "kill" and _rank == 1))
    _ended = share_out(_path, int(_batch), Path(_model), int(_every), _how, _rank if _here else -1, 9)
    if isinstance(_ended[1], str):
        sys.exit(_ended[1])
    Path(f"{_out}-{_rank}-of-{os.environ['WORLD_SIZE']}").write_bytes(pickle.dumps(_ended))
