"""The command ``store``: what finished stages take on the disk, and what of it may go."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cswap_deploy.cli.shared import Json, console_of, seconds

if TYPE_CHECKING:
    from cswap_deploy.records.store import Entry, Store

app = typer.Typer(help="What finished stages take on the disk, and what of it may go.")
Root = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="CSWAP_STORE's, or the user's own.")
]
_DAY = 86_400.0


@app.callback(invoke_without_command=True)
def show(context: typer.Context, root: Root = None, as_json: Json = False) -> None:
    """Size and entries; without a further word they are listed, the last used one first."""
    if context.invoked_subcommand is not None:
        return
    store, console = _open(root), console_of(as_json=as_json)
    rows = [_row(entry) for entry in store.entries()]
    total = sum(row["size_bytes"] for row in rows)
    if as_json:
        console.result({"store": str(store.root), "size_bytes": total, "entries": rows})
        return
    if rows:
        console.table("entries", [row | {"key": row["key"][:12]} for row in rows])
    typer.echo(f"{store.root}: {len(rows)} entries, {total / 2**20:.1f} MiB", err=True)


@app.command()
def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="30d", help="Days since the last use; 12h.")
    ],
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Remove what no build used for so long; what one reads now stays."""
    store = _open(root)
    gone = store.prune(unused_seconds=seconds(older_than))
    console_of(as_json=as_json).result(
        {
            "store": str(store.root), "removed": len(gone),
            "freed_bytes": sum(entry.size_bytes for entry in gone),
        }
    )  # fmt: skip


@app.command()
def verify(
    remove: Annotated[bool, typer.Option("--remove", help="Damaged entries go.")] = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Hold every entry against its digests; exit 6 where one is damaged."""
    from cswap_deploy.errors import ArtifactError

    store = _open(root)
    entries = {entry.key: entry for entry in store.entries()}
    wrong = store.verify()
    gone = [key for key in wrong if remove and store.remove(key)]
    left = [
        f"{key[:12]} ({entries[key].stage or 'unknown'}): {words}"
        for key, words in wrong.items()
        if key not in gone
    ]
    if left:
        raise ArtifactError(
            f"{len(left)} of {len(entries)} entries of {store.root} are damaged:\n  "
            + "\n  ".join(left),
            fix=f"cswap-deploy store verify --remove --store {store.root}",
        )
    told = {"store": str(store.root), "entries": len(entries), "removed": len(gone)}
    console_of(as_json=as_json).result(told)


def _open(root: Path | None) -> Store:
    """The store, without what dead processes left in it."""
    from cswap_deploy.records.store import Store

    store = Store(root)
    store.clean()
    return store


def _row(entry: Entry) -> dict[str, Any]:
    now = time.time()
    return {
        "key": entry.key,
        "stage": entry.stage or "unknown",
        "size_bytes": entry.size_bytes,
        "age_days": round((now - entry.made) / _DAY, 1),
        "unused_days": round((now - entry.used) / _DAY, 1),
    }
