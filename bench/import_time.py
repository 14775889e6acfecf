"""How long `import hbkit` takes: fresh processes, the contenders taking turns, least and median.

    python bench/import_time.py [--rounds 20]

Least is the figure to compare: other work on the machine only ever adds to it. The requirement is 0.3 s.
"""

import argparse
import statistics
import subprocess
import sys
import time

CONTENDERS = {"python alone": "pass", "import numpy": "import numpy", "import hbkit": "import hbkit"}


def seconds(code: str) -> float:
    """Wall time of one Python process that runs `code`, its start and end included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for code in CONTENDERS.values():
        seconds(code)  # the first run reads from disk and writes bytecode
    for _ in range(rounds):
        for name, code in CONTENDERS.items():
            taken[name].append(seconds(code))
    print(f"{'':14}{'least':>10}{'median':>10}   ({rounds} fresh processes each)")
    for name, times in taken.items():
        print(f"{name:14}{min(times):9.3f}s{statistics.median(times):9.3f}s")
    alone = min(taken["python alone"])
    print(f"hbkit over python alone: {min(taken['import hbkit']) - alone:.3f} s; required: < 0.3 s")


if __name__ == "__main__":
    main()
