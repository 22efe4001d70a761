"""What can be built: small networks of many timm families, pruned by a fifth, exported, checked.

    python benchmarks/bench_matrix.py             # 65 of them, within 25 minutes on two cores
    python benchmarks/bench_matrix.py --all       # and those that take longest
    python benchmarks/bench_matrix.py --quick     # the dozen that the tests always run
    python benchmarks/bench_matrix.py --names mobilevit_xxs levit_128s

Of every network that is built: the pruned network's outputs are ONNX Runtime's at batch 1, 2 and 7,
to 1e-4 of the largest logit; its parameters are as many as the plan says; plan and weights, on a
module made afresh, give the same outputs. Each network has a process and a time limit of its own,
so that aborts and hangs are counted. Weights are random and made lively, images are noise of 64
pixels or the fewest that the architecture takes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one network a core

from timm_matrix import (  # noqa: E402
    BROKEN,
    CASES,
    FAST,
    LIMIT_S,
    LONG,
    MOST_REFUSED,
    Row,
    full_table,
    row_of,
    save_rows,
    write_table,
)


def run(names: list[str], *, jobs: int, limit_s: float) -> Iterator[Row]:
    """Rows in the order of the names; each is told as soon as it is there."""

    def one(name: str) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(name, Path(folder), limit_s=limit_s)
        said = row.reason.partition("\n")[0] or f"{len(row.excluded)} parts whole"
        print(f"{name}: {row.verdict}, {row.seconds:.0f} s, {said}", file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, names)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the dozen of the tests")
    parser.add_argument("--all", action="store_true", help="those that take longest, too")
    parser.add_argument("--names", nargs="+", choices=list(CASES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="networks at a time")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds a network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the table into this page")
    args = parser.parse_args()
    wanted = FAST if args.quick else CASES.keys() - (set() if args.all else LONG)
    names = args.names or [n for n in CASES if n in wanted]
    begun = time.perf_counter()
    rows: list[Row] = []
    for row in run(names, jobs=args.jobs, limit_s=args.limit):
        rows.append(row)
        if args.json:  # a run that is cut short keeps what it found
            save_rows(args.json, rows)
    seconds = time.perf_counter() - begun
    print(full_table(rows))
    if args.page:
        write_table(args.page, rows)
    counts = Counter(row.verdict for row in rows)
    broken = {row.name: f"{row.verdict}: {row.reason}" for row in rows if row.verdict in BROKEN}
    result = {
        "networks": len(rows), "families": len({row.family for row in rows}),
        "counts": dict(counts), "broken": broken, "seconds": round(seconds),
    }  # fmt: skip
    print(json.dumps(result))
    return 1 if broken or counts["refused"] > MOST_REFUSED else 0


if __name__ == "__main__":
    sys.exit(main())
