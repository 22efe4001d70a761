"""What ``bench_accuracy.py`` measured: one file a model, one row a case."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_CODE = ("cswap_deploy/network", "cswap_deploy/causal", "cswap_deploy/pruning", "cswap_deploy/data")
"""What decides which units go and what becomes of the rest."""
_EFFECTS = {"effects.py", "significance.py", "cost.py"}
"""Only the presets measure effects: a change here leaves the peers' figures as they are."""


@dataclass(frozen=True)
class Result:
    """One network pruned in one way."""

    model: str
    method: str
    refit: bool
    cost_aware: bool
    ratio: float
    ratio_of: str
    removed: float
    """Fraction that really went."""
    seed: int
    calibration: int
    """Images."""
    top1: float
    top1_dense: float
    agreement: float
    """Fraction of test images on which pruned and dense network name the same class."""
    kl: float
    """From the dense network's output to the pruned one's, mean over the test images, nats."""
    images: int
    """Test images."""
    seconds: float
    """Scoring (shared by all ratios of a seed) and removing."""
    code: str
    """Digest of the code and the libraries' versions; see :func:`code_digest`."""
    torch: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What was asked for."""
        return (
            self.method, self.refit, self.cost_aware, self.ratio, self.ratio_of, self.seed,
            self.calibration,
        )  # fmt: skip


def read_results(path: Path) -> dict[tuple[Any, ...], Result]:
    """Rows by what was asked for; empty where there is no file."""
    if not path.is_file():
        return {}
    rows = (Result(**row) for row in json.loads(path.read_text())["rows"])
    return {row.key: row for row in rows}


def write_result(path: Path, result: Result) -> None:
    """Add or replace one row; safe beside other processes that do the same."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"bench-accuracy-{name}.lock"):
        rows = read_results(path) | {result.key: result}
        lines = ",\n".join(json.dumps(asdict(rows[key])) for key in sorted(rows))
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(f'{{"model": "{result.model}", "rows": [\n{lines}\n]}}\n')
        aside.replace(path)


@cache
def code_digest(*, peer: bool) -> str:
    """Changes when a figure may change: with the code, but not its comments, and the libraries."""
    files = [f for folder in _CODE for f in sorted((ROOT / folder).glob("*.py"))]
    if peer:
        files = [f for f in files if f.name not in _EFFECTS]
        files.append(ROOT / "benchmarks/peers.py")
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(f"{file.name}\n{code(file.read_text())}\n".encode())
    for package in ("torch", "torch-pruning", "numpy", "timm"):
        hasher.update(f"{package} {version(package)}\n".encode())
    return hasher.hexdigest()[:12]


def code(source: str) -> str:
    """Source without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
