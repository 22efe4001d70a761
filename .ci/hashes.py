"""Hold the files that pip downloaded against the digests that are known of them.

    python .ci/hashes.py [--learn] REPORT...

A REPORT is what ``pip install --report`` writes. ``.ci/hashes.txt`` has a line a file, as sha256sum
writes it. A file of a known name and another digest is an error (exit 1); one of an unknown name,
as wheels of another platform or version have, is counted and named; ``--learn`` adds those.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

KNOWN = Path(__file__).with_name("hashes.txt")


def downloaded(report: Path) -> dict[str, str]:
    """File name -> sha256 of what one call of pip installed from archives."""
    found = {}
    for item in json.loads(report.read_text())["install"]:
        told = item["download_info"]
        if "archive_info" in told:  # else a folder: this project
            name = unquote(Path(urlsplit(told["url"]).path).name)
            archive = told["archive_info"]  # pip before 23.1 has "hash" alone
            found[name] = archive.get("hashes", {}).get("sha256") or archive["hash"].split("=")[1]
    return found


def main() -> int:
    """Say what differs; the exit code."""
    learn = "--learn" in sys.argv
    reports = [Path(name) for name in sys.argv[1:] if name != "--learn"]
    if not any(report.is_file() for report in reports):
        print(
            "no record of what was downloaded\n  fix: rm -r .venv && make install", file=sys.stderr
        )
        return 1
    found: dict[str, str] = {}
    for report in reports:
        found |= downloaded(report)
    lines = KNOWN.read_text().splitlines() if KNOWN.is_file() else []
    known = dict(reversed(line.split("  ", 1)) for line in lines)
    wrong = sorted(name for name in found if known.get(name, found[name]) != found[name])
    new = sorted(found.keys() - known.keys())
    for name in wrong:
        print(f"{name} has sha256 {found[name]}, known is {known[name]}", file=sys.stderr)
    if wrong:
        print("  fix: rm -r .venv, and find out where these files come from", file=sys.stderr)
        return 1
    if learn:
        both = sorted((known | found).items())
        KNOWN.write_text("".join(f"{digest}  {name}\n" for name, digest in both))
    said = f"{len(found) - len(new)} of {len(found)} downloaded files have their known digest"
    print(said + ("" if learn or not new else f"; not known: {', '.join(new)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
