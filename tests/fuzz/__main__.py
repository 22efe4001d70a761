"""`python -m fuzz [--cases N] [--parser NAME] [--case N]`: a table; exit 1 on faults."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fuzz.cases import run_apart, run_here, spoilt
from fuzz.parsers import PARSERS


def main() -> int:
    asked = argparse.ArgumentParser(prog="fuzz")
    asked.add_argument("--cases", type=int, default=100_000, help="of each parser (100,000)")
    asked.add_argument("--first", type=int, default=0, help="number of the first")
    asked.add_argument("--parser", choices=PARSERS, action="append", help="this one; repeat")
    asked.add_argument("--case", type=int, help="run this one here, and show what is raised")
    asked.add_argument("-o", "--output", type=Path, help="with --case: leave its file there")
    given = asked.parse_args()
    names = given.parser or list(PARSERS)
    if given.case is not None:
        return _one(names[0], given.case, given.output)
    print(f"{'parser':<14}{'cases':>9}{'read':>9}{'refused':>9}{'faults':>8}{'seconds':>9}")
    bad = 0
    for name in names:
        found = run_apart(name, range(given.first, given.first + given.cases))
        faults = sum(map(len, found.faults.values()))
        refused = found.cases - found.read - faults
        print(
            f"{name:<14}{found.cases:>9,}{found.read:>9,}{refused:>9,}{faults:>8,}"
            f"{found.seconds:>9.1f}",
            flush=True,
        )
        for what, cases in sorted(found.faults.items(), key=lambda f: -len(f[1])):
            print(f"    {len(cases)} x {what} (--case {cases[0]})", flush=True)
        bad += faults
    return 1 if bad else 0


def _one(name: str, case: int, output: Path | None) -> int:
    parser = PARSERS[name]
    if output is not None:
        output.write_bytes(spoilt(parser, parser.seeds(), name, case))
    for _, wrong in run_here(name, range(case, case + 1)):
        print({None: "refused", "": "read"}.get(wrong, wrong))
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
