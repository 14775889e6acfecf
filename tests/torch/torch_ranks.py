"""Ranks as processes, which a server that has imported torch forks, and what tests have them do."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch

import hbkit.torch as hb
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
    for channel in (other, transport):
        channel.close()
        channel.close()
    return len(good) == 7 and all(good)


def lose(how, lost, timeout):
    """Exchange on two channels until rank `lost` is; seconds it took, and the errors of both threads."""
    transport = hb.distributed.GroupTransport(timeout=timeout)
    other, errors = transport.split(), []

    def go(channel):
        try:
            while True:
                channel.all_to_all(np.zeros(transport.size * 1000, np.uint8), np.full(transport.size, 1000))
        except Exception as e:
            errors.append(f"{type(e).__name__}: {e}")

    thread = threading.Thread(target=go, args=(other,), daemon=True)
    if transport.rank == lost:
        threading.Timer(0.3, strike, (how, transport)).start()
    began = time.monotonic()
    thread.start()
    go(transport)
    thread.join()
    return time.monotonic() - began, errors


def strike(how, transport):
    if how == "abort":
        transport.abort("ValueError: the reason")
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
