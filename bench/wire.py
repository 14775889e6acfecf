"""Rows to int8 and back, beside FBGEMM's and torch's kernels; GB/s of what is read and written.

``python bench/wire.py --peers torchrec/bin/python [--dims 16,32,128] [--mib 64] [--clock cpu]``

One thread, ``--mib`` MiB of normal float32 rows; `contest.py` says how times are taken. A pass packs all rows, or
unpacks them, between memory that is retained: hbkit and FBGEMM (its operators with an output) take it. Caveats:

- Bytes of a row differ: hbkit dim + 2, FBGEMM and ``embedding_bag_byte_prepack`` dim + 8 (a float32 scale and bias).
  To favour nobody, every contender's rate counts 5 bytes a value: the float32 and the int8.
- torch's ``embedding_bag_byte_prepack`` and ``_unpack`` cannot be given memory: they allocate, as their users do.
- "at random" is hbkit's rounding of gradients, which no peer has on the CPU; "float16" and "bfloat16" are casts
  (torch: ``copy_``), counted at 6 bytes a value.
- "copy" is ``memcpy`` of the float32 rows, counted at 8 bytes a value.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import contest

GOALS = {"pack": 1.3, "unpack": 1.4}
OURS = ("hbkit", "hbkit at random", "hbkit float16", "hbkit bfloat16", "copy")
PEERS = ("FBGEMM", "torch prepack", "torch float16", "torch bfloat16")
RIVALS = {
    "hbkit": ("FBGEMM", "torch prepack"),
    "hbkit float16": ("torch float16",),
    "hbkit bfloat16": ("torch bfloat16",),
}
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def ours(name: str, n: int, dim: int) -> Pair:
    """To pack and to unpack once."""
    import numpy as np

    from hbkit.shuffle import Noise, pack, row_nbytes, unpack

    rows = np.random.default_rng(0).standard_normal((n, dim), np.float32)
    out = np.zeros_like(rows)
    if name == "copy":
        return (lambda: np.copyto(out, rows),) * 2
    wire = "int8" if name in OURS[:2] else name.split()[1]
    noise = Noise(0, "table", 0, 1, np.arange(n)) if name == "hbkit at random" else None
    data = np.zeros(n * row_nbytes(dim, wire), np.uint8)
    return (lambda: pack(rows, wire, data, noise)), (lambda: unpack(data, dim, wire, out))


def peers(name: str, n: int, dim: int) -> Pair:
    """To pack and to unpack once."""
    import torch

    torch.set_num_threads(1)
    rows = torch.randn(n, dim)
    out = torch.zeros_like(rows)
    if name == "FBGEMM":
        import fbgemm_gpu  # noqa: F401 # registers the operators

        ops = torch.ops.fbgemm
        data = ops.FloatToFused8BitRowwiseQuantized(rows)
        return (
            lambda: ops.FloatToFused8BitRowwiseQuantizedOut(data, rows),
            lambda: ops.Fused8BitRowwiseQuantizedToFloatOut(out, data),
        )
    if name == "torch prepack":
        quantized = torch.ops.quantized
        data = quantized.embedding_bag_byte_prepack(rows)
        return (lambda: quantized.embedding_bag_byte_prepack(rows)), (lambda: quantized.embedding_bag_byte_unpack(data))
    data = rows.to(getattr(torch, name.split()[1]))
    return (lambda: data.copy_(rows)), (lambda: out.copy_(data))


def compete(name: str, dim: int, mib: int) -> None:
    """Print seconds a pass of both ways; passes over few rows are timed several together."""
    n, together = (mib << 20) // (4 * dim), max(1, 64 // mib)
    found: dict[str, float] = {"rows": n}
    for way, run in zip(GOALS, (ours if name in OURS else peers)(name, n, dim), strict=True):
        run()
        wall, cpu, began, k = float("inf"), float("inf"), time.perf_counter(), 0
        while k < 5 or time.perf_counter() - began < 0.7:
            w, c = time.perf_counter(), time.process_time()
            for _ in range(together):
                run()
            wall, cpu, k = min(wall, time.perf_counter() - w), min(cpu, time.process_time() - c), k + 1
        found |= {f"{way} wall": wall / together, f"{way} cpu": cpu / together}
    print(json.dumps(found))


def main() -> None:
    """Print a table for each dim, and its figures as JSON."""
    ap = contest.arguments(__doc__, rounds=5)
    ap.add_argument("--peers", required=True, help="Python with torch and fbgemm-gpu-cpu")
    ap.add_argument("--dims", default="16,32,128")
    ap.add_argument("--mib", type=int, default=64)
    a = ap.parse_args()
    if a.contender:
        contest.limit_threads(1)
        compete(a.contender, int(a.dims), a.mib)
        return
    contest.machine(
        clock=a.clock, rounds=a.rounds, mib=a.mib, **contest.versions(a.peers, ["torch", "fbgemm-gpu-cpu", "torchrec"])
    )
    for dim in map(int, a.dims.split(",")):
        options = "--peers", a.peers, "--dims", str(dim), "--mib", str(a.mib)
        commands = {c: contest.itself(sys.executable, __file__, c, *options) for c in OURS}
        commands |= {c: contest.itself(a.peers, __file__, c, *options) for c in PEERS}
        figures = contest.take_turns(commands, a.rounds)
        print(f"\ndim {dim:3} {'GB/s:':>18}" + "".join(f"{way:>10}" for way in GOALS) + "   times its best rival")
        for name, rounds in figures.items():
            n_bytes = rounds[0]["rows"] * dim * (8 if name == "copy" else 6 if name.endswith("float16") else 5)
            speed = {w: round(n_bytes / contest.median(figures, name, f"{w} {a.clock}") / 1e9, 1) for w in GOALS}
            ratios = {
                w: round(contest.ratio(figures, name, RIVALS[name], f"{w} {a.clock}"), 2)
                for w in (GOALS if name in RIVALS else ())
            }
            goal = f"  (goals {GOALS['pack']} and {GOALS['unpack']})" if name == "hbkit" else ""
            print(
                f"{name:26}"
                + "".join(f"{speed[w]:10.1f}" for w in GOALS)
                + "".join(f"{r:8.2f}" for r in ratios.values())
                + goal
            )
            print(json.dumps({"dim": dim, "contender": name, "GB/s": speed, "ratio": ratios}), flush=True)
    print("\nbytes on the wire over float32's; hbkit's scales among them")
    for dim in map(int, a.dims.split(",")):
        print(
            f"dim {dim:3}: hbkit {(dim + 2) / dim / 4:.4f} (scales {2 / dim / 4:.4f}); "
            f"TorchRec's INT8 codec {(32 + 8) / 32 / 4:.4f} by 32 values, {(dim + 8) / dim / 4:.4f} by whole rows"
        )


if __name__ == "__main__":
    main()
