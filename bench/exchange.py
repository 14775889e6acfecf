"""What the wire type makes of the exchange between two ranks: on one machine, or as hosts with a link of limited rate.

``python bench/exchange.py [--rate 1gbit] [--dims 16,32,64,128] [--keys 16384] [--steps 20] [--rounds 3]``
``python bench/exchange.py --train [--rate 1gbit] [--dims 32] [--batch 4096] [--steps 40] [--rounds 3]``

Two processes over torch.distributed (Gloo), each on a core of its own. Without ``--rate`` they talk over loopback; with
it each lives in a network namespace of its own (``ip netns``, as root), and the pair of virtual links between them is
held to that rate each way by ``tc qdisc ... tbf``; what one transfer of 32 MiB really reaches is printed first.

The exchange: each rank asks the other for ``--keys`` rows and later sends as many gradients, packed and unpacked as
training does; what a rank owns itself does not travel. Its time is that of rows and gradients; that of keys, which
training sends beside earlier steps, stands apart. ``--train`` measures whole steps instead: DeepFM on synthetic clicks
(26 keys a row), through the pipeline. Wire types take turns in each round; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WIRES = ("float32", "float16", "int8")
HOSTS = [f"hbkit-{os.getpid()}-{i}" for i in range(2)]


def hosts(rate: str, stack: ExitStack) -> tuple[str, list[list[str]]]:
    """Two namespaces joined by a link of that rate: the first one's address, and the command to run within each."""

    def sh(command: str) -> None:
        subprocess.run(command.split(), check=True)

    for host in HOSTS:
        sh(f"ip netns add {host}")
        stack.callback(sh, f"ip netns del {host}")
    sh(f"ip -n {HOSTS[0]} link add link0 type veth peer name link1 netns {HOSTS[1]}")
    for i, host in enumerate(HOSTS):
        sh(f"ip -n {host} addr add 10.77.0.{i + 1}/24 dev link{i}")
        for device in (f"link{i}", "lo"):
            sh(f"ip -n {host} link set {device} up")
        sh(f"ip netns exec {host} tc qdisc add dev link{i} root tbf rate {rate} burst 1mb latency 50ms")
    return "10.77.0.1", [
        ["ip", "netns", "exec", host, "env", f"GLOO_SOCKET_IFNAME=link{i}"] for i, host in enumerate(HOSTS)
    ]


def launch(a: argparse.Namespace) -> list[Any]:
    """What rank 0 printed, line by line."""
    with ExitStack() as stack:
        address, within = hosts(a.rate, stack) if a.rate else ("127.0.0.1", [[], []])
        processes = []
        for rank, prefix in enumerate(within):
            env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "29400"}
            env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            command = [*prefix, sys.executable, __file__, *sys.argv[1:], "--data", a.data]
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE if rank == 0 else None))
            stack.callback(processes[-1].kill)
        out, _ = processes[0].communicate(timeout=a.limit)
        if processes[0].returncode or processes[1].wait(30):
            raise SystemExit("a rank failed")
        return [json.loads(line) for line in out.splitlines()]


def timed(transport: Any, act: Callable[[], Any]) -> float:
    """Seconds that it takes until both ranks are done."""
    transport.all_gather(b"")
    start = time.perf_counter()
    act()
    transport.all_gather(b"")
    return time.perf_counter() - start


def link(transport: Any) -> float:
    """Mbit/s each way of a large transfer."""
    import numpy as np

    n = 32 << 20
    counts = np.array([0, n] if transport.rank == 0 else [n, 0])
    data = np.ones(n, np.uint8)
    return n * 8 / 1e6 / min(timed(transport, lambda: transport.all_to_all(data, counts, counts)) for _ in range(2))


def exchange(transport: Any, a: argparse.Namespace, dim: int, wire: str) -> dict[str, float]:
    """Milliseconds of a step's keys, and of its rows and gradients."""
    import numpy as np

    from hbkit.shuffle import Noise, pack, row_nbytes, unpack

    rng = np.random.default_rng(transport.rank)
    rows, keys = rng.normal(size=(a.keys, dim)).astype(np.float32), rng.integers(0, 1 << 60, a.keys)
    got, packed = np.empty_like(rows), np.empty(a.keys * row_nbytes(dim, wire), np.uint8)

    def other(nbytes: int) -> Any:
        return np.array([0, nbytes] if transport.rank == 0 else [nbytes, 0])

    def send(noise: Noise | None) -> None:
        n = other(len(packed))
        data, _ = transport.all_to_all(pack(rows, wire, packed, noise), n, n)
        unpack(data, dim, wire, got)

    def rows_and_gradients() -> None:
        for step in range(a.steps):
            send(None)
            send(Noise(0, "t", transport.rank, step, keys))

    def ask() -> None:
        n = other(keys.nbytes)
        for _ in range(a.steps):
            transport.all_to_all(keys.view(np.uint8), n)

    timed(transport, rows_and_gradients)
    return {
        "keys_ms": timed(transport, ask) / a.steps * 1e3,
        "exchange_ms": timed(transport, rows_and_gradients) / a.steps * 1e3,
        "nbytes": 2 * len(packed),
    }


def train(transport: Any, a: argparse.Namespace, dim: int, wire: str) -> dict[str, float]:
    """Milliseconds of a training step, over ``--steps`` steps after some to warm up."""
    import torch

    import hbkit.torch as hb
    from hbkit.data import Dataset
    from hbkit.embedding import Adagrad, Collection, Normal, Table

    whole = Dataset.from_parquet(a.data)
    sparse = [name for name, kind in whole.schema.items() if kind.dtype == "int64" and name != "label"]
    dense = [name for name in whole.schema if name not in (*sparse, "label")]
    ds = Dataset.from_parquet(a.data, ["label", *dense, *sparse], shard=(transport.rank, transport.size))
    ds = ds.supervised("label").batch(a.batch)
    width = hb.models.DeepFM.row_dim(dim)
    tables = [Table(name, width, initializer=Normal(0, 0.01), optimizer=Adagrad(lr=0.05)) for name in sparse]
    embeddings = hb.distributed.shard(Collection(tables), transport.split(), wire)
    torch.manual_seed(0)
    trainer = hb.training.Trainer(hb.models.DeepFM(sparse, dim, len(dense)), embeddings)
    ends: list[float] = []
    trainer.fit(ds, lambda n_rows, loss: ends.append(time.perf_counter()))
    embeddings.collection.close()
    return {"step_ms": (ends[-1] - ends[-1 - a.steps]) / a.steps * 1e3}


def work(a: argparse.Namespace) -> None:
    """One rank: rank 0 prints a JSON line for each measurement."""
    import torch

    import hbkit.torch as hb

    torch.set_num_threads(1)
    transport = hb.distributed.GroupTransport(timeout=a.limit)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[transport.rank % len(cores)]})
    figures: list[dict[str, Any]] = [{"link_mbit": link(transport)}]
    for _ in range(a.rounds):
        for dim in map(int, a.dims.split(",")):
            for wire in WIRES:
                measure = train if a.train else exchange
                figures.append({"dim": dim, "wire": wire, **measure(transport, a, dim, wire)})
    if transport.rank == 0:
        print("\n".join(map(json.dumps, figures)))
    transport.all_gather(b"")
    transport.close()


def main() -> None:
    """Print a table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rate", help="of the link between two hosts, as tc takes it: 1gbit, 10gbit; none: loopback")
    ap.add_argument("--train", action="store_true")
    ap.add_argument("--dims", default="16,32,64,128")
    ap.add_argument("--keys", type=int, default=16384)
    ap.add_argument("--batch", type=int, default=4096)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--limit", type=float, default=450)
    ap.add_argument("--data", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if "RANK" in os.environ:
        work(a)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # namespaces do not go away by themselves
    with tempfile.TemporaryDirectory() as d:
        a.data = str(Path(d) / "clicks.parquet")
        if a.train:
            from hbkit.data.synth import synthesize

            synthesize(a.data, 2 * a.batch * (a.steps + 10), 0, "criteo")
        first, *figures = launch(a)
    print(f"link: {first['link_mbit']:,.0f} Mbit/s each way ({a.rate or 'loopback'})")
    names = ("step_ms",) if a.train else ("nbytes", "keys_ms", "exchange_ms")
    print("dim  wire     " + "  ".join(f"{name:>12}" for name in names) + "   float32 / this, by round")
    for dim in map(int, a.dims.split(",")):
        times: dict[str, list[float]] = {}
        for wire in WIRES:
            mine = [f for f in figures if (f["dim"], f["wire"]) == (dim, wire)]
            times[wire] = [f[names[-1]] for f in mine]
            cells = "  ".join(f"{statistics.median(f[name] for f in mine):12,.2f}" for name in names)
            ratios = [old / new for old, new in zip(times["float32"], times[wire], strict=True)]
            print(f"{dim:<4} {wire:8} {cells}   {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
