"""Hit rates of the cache of near lines, on traces, beside reference policies and what a clairvoyant would reach.

``python bench/cache.py [--data DIR] [--only cost|zipf|churn|rotate|movielens|criteo] [--ahead 1,2,...]``

Everything of hbkit goes through the real `Cache` and `Window`. A trace is a list of batches of distinct keys. What a
batch misses is held in addition while the batch is used, so the capacity C counts what is kept from batch to batch: the
cache has C lines and room for the largest batch, and goes back to C after each batch. The references live by the same
rule: hits are counted by what is there when a batch begins, then the batch's keys are put in one after the other, or,
for those that are an order (LRU, LFU, clairvoyant), the first C of what was there and what the batch brings are kept.
Caveats:

- The references are plain and may hold any memory: "perfect LFU" counts every key for ever, "aged LFU" counts every
  key and halves all counts each 10 C accesses, W-TinyLFU (window 1%, protected 80%) has exact counts in place of
  a sketch, up to 15 and halved each 10 C accesses. S3-FIFO is that of the paper (small queue 10%, ghosts as the main
  one). "Belady" keeps the keys that are needed soonest and may leave out a newcomer: the best there is.
- "cost" is CPU time in a full cache of a million lines; most of it waits for memory, so others on the machine show.
- Hits of the first quarter of a trace are not counted: caches are filling.
- Synthetic traces: 200,000 keys by Zipf(1.05). "churn" gives keys new places in the order of popularity, half of all
  within 1,000 batches; "rotate" shifts the whole order by one key a batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hbkit.cli.plan import clairvoyant, hits
from hbkit.store.cache import Cache, Window
from hbkit.store.policy import POLICIES

N_KEYS, DRAWS, N_BATCHES = 200_000, 2_000, 2_000
SHARES = (0.01, 0.05, 0.10, 0.20)
NEVER = np.iinfo(np.int64).max

Trace = list[np.ndarray]


# --- traces -----------------------------------------------------------------------------------------------------


def ranks(seed: int = 0) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    law = np.cumsum(np.arange(1, N_KEYS + 1) ** -1.05)
    for _ in range(N_BATCHES):
        yield np.searchsorted(law, rng.random(DRAWS) * law[-1])


def zipf() -> Trace:
    return [np.unique(r) for r in ranks()]


def churn() -> Trace:
    rng, key = np.random.default_rng(1), np.arange(N_KEYS)
    out = []
    for r in ranks():
        some = rng.choice(N_KEYS, round(N_KEYS * np.log(2) / 1000), replace=False)
        key[some] = key[np.roll(some, 1)]
        out.append(np.unique(key[r]))
    return out


def rotate() -> Trace:
    return [np.unique((r + i) % N_KEYS) for i, r in enumerate(ranks())]


def batches(column: np.ndarray, n: int = 512) -> Trace:
    """Batches of n rows of a column of numbers, which are made dense."""
    dense = np.unique(column, return_inverse=True)[1].reshape(len(column), -1)
    return [np.unique(dense[i : i + n]) for i in range(0, len(dense), n)]


def movielens(data: Path) -> dict[str, Trace]:
    table = pq.read_table(data / "ml-1m" / "ratings.parquet")
    table = table.filter(pc.is_valid(table["timestamp"])).sort_by("timestamp")
    return {f"MovieLens {name}": batches(table[name].to_numpy()) for name in ("user_id", "movie_id")}


def criteo(data: Path) -> dict[str, Trace]:
    """The ten columns of most keys, each with its own keys, as one trace: a collection of tables in one cache."""
    table = pq.read_table(data / "criteo-80k" / "clicks.parquet")
    columns = []
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            if pc.max(pc.list_value_length(column)).as_py() > 1:
                continue
            column = pc.list_element(pc.if_else(pc.equal(pc.list_value_length(column), 1), column, None), 0)
        if pa.types.is_floating(column.type):
            continue
        values = column.dictionary_encode()
        columns.append((len(values.dictionary), name, values.indices.fill_null(0).to_numpy()))
    columns = sorted(columns, key=lambda c: -c[0])[:10]
    first = np.cumsum([0, *(c[0] for c in columns)])[:-1]
    return {"Criteo": batches(np.stack([c[2] + f for c, f in zip(columns, first, strict=True)], axis=1), 128)}


# --- references -------------------------------------------------------------------------------------------------


def kept(trace: Trace, size: int, worth: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Hits of each batch where, after each, the `size` keys of most ``worth(i, keys)`` are kept."""
    near = np.zeros(max(int(b.max()) for b in trace) + 1, np.bool_)
    held, out = np.zeros(0, np.int64), np.zeros(len(trace), np.int64)
    for i, keys in enumerate(trace):
        new = keys[~near[keys]]
        out[i] = len(keys) - len(new)
        held = np.concatenate([held, new])
        near[new] = True
        value = worth(i, held)
        if len(held) > size:
            order = np.argpartition(-value, size)
            near[held[order[size:]]] = False
            held = held[order[:size]]
    return out


def n_keys(trace: Trace) -> int:
    return max(int(b.max()) for b in trace) + 1


def lru(trace: Trace, size: int) -> np.ndarray:
    last = np.zeros(n_keys(trace))

    def worth(i: int, held: np.ndarray) -> np.ndarray:
        last[trace[i]] = i
        return last[held]

    return kept(trace, size, worth)


def lfu(trace: Trace, size: int, halve: bool = False) -> np.ndarray:
    count, last = np.zeros(n_keys(trace)), np.zeros(n_keys(trace))
    since = 0

    def worth(i: int, held: np.ndarray) -> np.ndarray:
        nonlocal since
        count[trace[i]] += 1
        last[trace[i]] = i
        since += len(trace[i])
        if halve and since >= 10 * size:
            count[:] /= 2
            since = 0
        return count[held] + last[held] * 1e-6  # ties: the most recent stays

    return kept(trace, size, worth)


def aged_lfu(trace: Trace, size: int) -> np.ndarray:
    return lfu(trace, size, halve=True)


def joined(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(trace), np.cumsum([0, *map(len, trace)])


def s3fifo(trace: Trace, size: int) -> np.ndarray:
    keys, splits = joined(trace)
    return _s3fifo(keys, splits, n_keys(trace), size)


@numba.njit(cache=True)
def _s3fifo(keys, splits, n, size):
    where, freq, ghost = np.zeros(n, np.int8), np.zeros(n, np.int8), np.zeros(n, np.int64)  # 0 away, 1 small, 2 main
    n_small = max(1, size // 10)
    room = len(keys) * 5 + 10
    small, main = np.zeros(room, np.int64), np.zeros(room, np.int64)
    s0 = s1 = m0 = m1 = 0
    n_ghosts = 1  # ghosts ever made; the last size - n_small of them are remembered
    hits = np.zeros(len(splits) - 1, np.int64)
    for b in range(len(splits) - 1):
        batch = keys[splits[b] : splits[b + 1]]
        for k in batch:
            hits[b] += where[k] > 0
        for k in batch:
            if where[k] > 0:
                freq[k] = min(freq[k] + 1, 3)
                continue
            while (s1 - s0) + (m1 - m0) >= size:
                if s1 - s0 >= n_small or m1 == m0:
                    while s1 > s0:
                        t = small[s0]
                        s0 += 1
                        if freq[t] > 0:
                            main[m1], where[t], freq[t] = t, 2, 0
                            m1 += 1
                        else:
                            where[t], ghost[t] = 0, n_ghosts
                            n_ghosts += 1
                            break
                else:
                    while m1 > m0:
                        t = main[m0]
                        m0 += 1
                        if freq[t] > 0:
                            freq[t] -= 1
                            main[m1] = t
                            m1 += 1
                        else:
                            where[t] = 0
                            break
            freq[k] = 0
            if ghost[k] > 0 and n_ghosts - ghost[k] <= size - n_small:
                main[m1], where[k] = k, 2
                m1 += 1
            else:
                small[s1], where[k] = k, 1
                s1 += 1
            ghost[k] = 0
    return hits


def w_tinylfu(trace: Trace, size: int) -> np.ndarray:
    keys, splits = joined(trace)
    return _w_tinylfu(keys, splits, n_keys(trace), size)


@numba.njit(cache=True)
def _out(after, before, k):
    after[before[k]], before[after[k]] = after[k], before[k]


@numba.njit(cache=True)
def _in(after, before, end, k):
    last = before[end]
    after[last], before[k], after[k], before[end] = k, last, end, k


@numba.njit(cache=True)
def _w_tinylfu(keys, splits, n, size):
    after, before = np.arange(n + 4), np.arange(n + 4)  # lists in order of use; n + where is the end of each
    where, count = np.zeros(n, np.int8), np.zeros(n, np.int16)  # 0 away, 1 window, 2 probation, 3 protected
    held = np.zeros(4, np.int64)
    room = np.array([0, max(1, size // 100), 0, 0])
    n_main = size - room[1]
    room[3] = n_main * 8 // 10
    since = 0
    hits = np.zeros(len(splits) - 1, np.int64)
    for b in range(len(splits) - 1):
        batch = keys[splits[b] : splits[b + 1]]
        for k in batch:
            hits[b] += where[k] > 0
        for k in batch:
            count[k] = min(count[k] + 1, 15)
            since += 1
            if since >= 10 * size:
                count >>= 1
                since //= 2
            if where[k] > 0:
                _out(after, before, k)
                held[where[k]] -= 1
                where[k] = 1 if where[k] == 1 else 3
                _in(after, before, n + where[k], k)
                held[where[k]] += 1
                if held[3] > room[3]:
                    t = after[n + 3]
                    _out(after, before, t)
                    where[t] = 2
                    _in(after, before, n + 2, t)
                    held[3] -= 1
                    held[2] += 1
                continue
            where[k] = 1
            _in(after, before, n + 1, k)
            held[1] += 1
            if held[1] > room[1]:
                t = after[n + 1]
                _out(after, before, t)
                held[1] -= 1
                where[t] = 2
                _in(after, before, n + 2, t)
                held[2] += 1
                if held[2] + held[3] > n_main:
                    v = after[n + 2] if held[2] > 1 else after[n + 3]
                    if count[t] <= count[v]:
                        v = t
                    _out(after, before, v)
                    held[where[v]] -= 1
                    where[v] = 0
    return hits


REFERENCES = {
    "Belady": clairvoyant,
    "perfect LFU": lfu,
    "aged LFU": aged_lfu,
    "S3-FIFO": s3fifo,
    "W-TinyLFU": w_tinylfu,
    "LRU": lru,
}


def cost_of(cache: Cache, trace: Trace) -> str:
    """What each call takes: us a batch (ns a key or victim)."""
    spent: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}

    def call(what: str, count: int, function: Callable, *args: np.ndarray) -> np.ndarray:
        start = time.process_time()
        out = function(*args)
        spent.setdefault(what, []).append(time.process_time() - start)
        counts.setdefault(what, []).append(count)
        return out

    for b in trace:
        lines = call("find", len(b), cache.find, b)
        call("access", len(b), cache.access, b, lines)
        new = b[lines < 0]
        victims = call("victims", len(new), cache.victims, len(new))
        call("remove", len(new), cache.remove, victims)
        call("insert", len(new), cache.insert, new)
    return ", ".join(
        f"{what} {1e6 * np.median(t):.0f} ({1e9 * np.median(np.array(t) / np.maximum(counts[what], 1)):.0f} ns)"
        for what, t in spent.items()
    )


def cost(policies: list[str], n_lines: int = 1_000_000, batch: int = 20_000, rounds: int = 200) -> None:
    """CPU time of each call for a batch of distinct keys, in a full cache; medians over the batches."""
    rng = np.random.default_rng(0)
    law = np.cumsum(np.arange(1, 5 * n_lines + 1) ** -1.05)
    keys = np.concatenate([np.unique(np.searchsorted(law, rng.random(2 * batch) * law[-1])) for _ in range(rounds * 2)])
    trace = [np.unique(keys[i * batch : (i + 1) * batch]) * 7919 for i in range(rounds)]
    n = np.mean([len(b) for b in trace])
    print(f"\n{n_lines:,} lines, batches of {n:.0f} distinct keys; us a batch, ns a key or victim")
    for policy in policies:
        cache = Cache(n_lines, POLICIES[policy])
        cache.insert(rng.permutation(n_lines) - 10**9)
        print(f"{policy:8s} {cost_of(cache, trace)}; {cache.nbytes / n_lines:.0f} bytes a line")
    window, t = Window(), []
    for i, b in enumerate(trace):
        start = time.process_time()
        window.announce(b)
        if i >= 32:
            window.release(i - 32)
        t.append(time.process_time() - start)
    print(f"window   announce and release {1e6 * np.median(t):.0f}; {window.nbytes / 32 / n:.0f} bytes a key announced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with ml-1m and criteo-80k")
    parser.add_argument("--only", help="traces whose name begins so")
    parser.add_argument("--ahead", default="1,2,4,8,16,32,64,128", help="batches that the default policy looks ahead")
    parser.add_argument("--policies", default=",".join(POLICIES))
    args = parser.parse_args()
    if args.only in (None, "cost"):
        cost(args.policies.split(","))
    makers: dict[str, Callable[[], dict[str, Trace]]] = {
        "zipf": lambda: {"zipf": zipf()},
        "churn": lambda: {"churn": churn()},
        "rotate": lambda: {"rotate": rotate()},
    }
    if args.data:
        makers |= {"movielens": lambda: movielens(args.data), "criteo": lambda: criteo(args.data)}
    for maker, make in makers.items():
        if args.only and not maker.startswith(args.only):
            continue
        for name, trace in make().items():
            show(name, trace, args.policies.split(","), [int(w) for w in args.ahead.split(",") if w])


def show(name: str, trace: Trace, policies: list[str], aheads: list[int]) -> None:
    n, asked = n_keys(trace), np.array([len(b) for b in trace])
    sizes = [max(1, round(n * share)) for share in SHARES]
    counted = slice(len(trace) // 4, None)
    print(f"\n{name}: {n:,} keys, {len(trace):,} batches of {asked.mean():.0f} distinct keys; hit rate %")
    print(f"{'':22s}" + "".join(f"{f'{share:.0%}':>9s}" for share in SHARES) + "   of Belady")
    best = None
    contenders: dict[str, Callable[[int], np.ndarray]] = {
        label: lambda size, f=f: f(trace, size) for label, f in REFERENCES.items()
    }
    for policy in policies:
        contenders[f"hbkit {policy}"] = lambda size, p=policy: hits(trace, size, POLICIES[p])
    for ahead in aheads:
        contenders[f"hbkit lfu, ahead {ahead}"] = lambda size, w=ahead: hits(trace, size, POLICIES["lfu"], w)
    for label, run in contenders.items():
        start = time.process_time()
        rates = np.array([run(size)[counted].sum() / asked[counted].sum() for size in sizes])
        best = rates if best is None else best
        print(
            f"{label:22s}"
            + "".join(f"{100 * r:9.2f}" for r in rates)
            + "  "
            + "".join(f"{100 * r:6.1f}" for r in rates / best)
            + f"   {time.process_time() - start:5.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
