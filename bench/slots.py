"""From keys to slots of a table: each value looked up, or each entry of the column's dictionary once; ns a value.

``python bench/slots.py --data DIR [--keys 50000,1000000,10000000]``

DIR holds lists_dict_snappy.parquet of ``workloads/decode.py``: a column of lists whose pages all refer to a dictionary.
Decoding is not counted. One thread; `contest.py` says how times are taken. Caveats:

- A row group is looked up at once, and its dictionary is looked up with it: nothing is kept from one to the next. The
  gain is that of many values for each distinct one, 17 here; a column of rare keys gains nothing.
- ``--keys`` is how many keys the table's index holds, the column's among them. All lookups find their key.
- "deduplicated" is what a table does with a batch whose codes it does not know: hash each value to find the distinct
  ones, and look those up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contest

GOAL = 6.0
CONTENDERS = ("through the dictionary", "value by value", "deduplicated")


def coded(path: Path, group: int) -> tuple[Any, Any]:
    """Distinct keys of a row group in the order of its dictionary, and the code of each value: int64[d], uint32[n]."""
    from hbkit.parquet import read_columns

    column = read_columns(path, ["l0"], [group], dictionary=True)["l0"]
    return column.dictionary, column.codes.values


def passes(name: str, path: Path, n_keys: int) -> Callable[[], Iterator[Any]]:
    """Slots of all row groups, one after another."""
    import numpy as np

    from hbkit._ext.index import Index, dedupe
    from hbkit.parquet import File
    from hbkit.ragged import gather

    groups = [coded(path, g) for g in range(len(File(path).row_group_rows))]
    values = [entries[codes] for entries, codes in groups]
    known = np.unique(np.concatenate([entries for entries, _ in groups]))
    rng = np.random.default_rng(0)
    others = rng.integers(1 << 40, 1 << 62, max(n_keys - len(known), 0))  # the column's keys are below
    index = Index()
    index.find_or_insert(rng.permutation(np.concatenate([known, others])))

    def by_dictionary() -> Iterator[Any]:
        for entries, codes in groups:
            yield gather(index.find(entries), codes)

    def by_value() -> Iterator[Any]:
        return map(index.find, values)

    def deduplicated() -> Iterator[Any]:
        for v in values:
            unique, inverse, _ = dedupe(v)
            yield index.find(unique)[inverse]

    for a, b, c in zip(by_dictionary(), by_value(), deduplicated(), strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c) and a.min() >= 0
    return dict(zip(CONTENDERS, (by_dictionary, by_value, deduplicated), strict=True))[name]


def main() -> None:
    """Print a line for each size of the index, and its figures as JSON."""
    ap = contest.arguments(__doc__)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--keys", default="50000,1000000,10000000")
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(1)
        contest.best(passes(a.contender, a.data / "lists_dict_snappy.parquet", int(a.keys)), len)
        return
    contest.machine(clock=a.clock, rounds=a.rounds)
    print(
        f"\n{'keys in the index':18}" + "".join(f"{c:>24}" for c in CONTENDERS) + "   ratio to value by value",
        flush=True,
    )
    for n_keys in a.keys.split(","):
        options = "--data", str(a.data), "--keys", n_keys
        figures = contest.take_turns(
            {c: contest.itself(sys.executable, __file__, c, *options) for c in CONTENDERS}, a.rounds
        )
        n = figures[CONTENDERS[0]][0]["n"]
        ns = {c: round(contest.median(figures, c, a.clock) / n * 1e9, 2) for c in CONTENDERS}
        ratio = contest.ratio(figures, CONTENDERS[0], CONTENDERS[1:2], a.clock)
        print(
            f"{int(n_keys):17,} " + "".join(f"{ns[c]:21.2f} ns" for c in CONTENDERS) + f"{ratio:8.2f}x (goal {GOAL}x)"
        )
        print(
            json.dumps({"keys": int(n_keys), "values": n, "ns": ns, "ratio": round(ratio, 2), "goal": GOAL}), flush=True
        )


if __name__ == "__main__":
    main()
