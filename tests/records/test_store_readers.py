"""Who reads an entry keeps what was found, and a store says what it holds."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cswap_deploy.records.store import Store

if TYPE_CHECKING:
    from conftest import Ran

Command = Callable[..., "Ran"]
KEY, OTHER = "a" * 64, "b" * 64
DAY = 86_400.0


def fill(store: Store, text: str, *, key: str = KEY, replace: bool = False) -> None:
    """An entry of two files with the same text."""
    with store.create(key, stage="prune", replace=replace) as folder:
        for name in ("plan.json", "weights.bin"):
            (folder / name).write_text(text)


def read(folder: Path | None) -> set[str]:
    assert folder is not None
    return {file.read_text() for file in folder.iterdir()}


def python(code: str, *words: object) -> subprocess.Popen[str]:
    """A process that runs code; ``sys.argv[1:]`` is what is given."""
    code = "import sys, time\nfrom pathlib import Path\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


READER = """
    from cswap_deploy.records.store import Store
    store = Store(Path(sys.argv[1]))
    found = store.find(sys.argv[2])
    print("holds", flush=True)
    sys.stdin.readline()
    print(*sorted({file.read_text() for file in found.iterdir()}), flush=True)
    sys.stdin.readline()
"""


def answer(reader: subprocess.Popen[str]) -> str:
    assert reader.stdin is not None
    assert reader.stdout is not None
    reader.stdin.write("\n")
    reader.stdin.flush()
    return reader.stdout.readline().strip()


# --- readers -------------------------------------------------------------------------------------


def test_a_replaced_entry_stays_for_the_process_that_reads_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "old")
    with python(READER, tmp_path, KEY) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "holds\n"
        with store.create(KEY, replace=True) as folder:
            (folder / "plan.json").write_text("new")
            assert read(Store(tmp_path).find(KEY)) == {"old"}, "until the new one is finished"
        assert read(store.find(KEY)) == {"new"}
        assert answer(reader) == "old"
        reader.communicate("\n", timeout=60)
    fill(store, "newest", replace=True)
    del store
    gc.collect()
    Store(tmp_path).clean()
    assert len(list((tmp_path / KEY).glob("files*"))) == 1, "what nobody reads goes"
    assert read(Store(tmp_path).find(KEY)) == {"newest"}


def test_a_removed_entry_stays_for_the_process_that_reads_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, "old")
    with python(READER, tmp_path, KEY) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "holds\n"
        assert not store.remove(KEY)
        assert store.prune(unused_seconds=-1) == ()
        assert answer(reader) == "old"
        reader.communicate("\n", timeout=60)
    assert store.remove(KEY)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_is_damaged_while_it_is_read_is_made_again_beside_it(tmp_path: Path) -> None:
    reader, store = Store(tmp_path), Store(tmp_path)
    fill(store, "old")
    held = reader.find(KEY)
    assert held is not None
    (held / "weights.bin").write_text("odl")
    assert store.find(KEY) is None
    assert "weights.bin has sha256" in store.damaged[0]
    fill(store, "new")
    assert read(store.find(KEY)) == {"new"}
    assert (held / "plan.json").read_text() == "old", "the reader's folder is still there"


def mixed(root: Path, number: int) -> list[str]:
    """Replace and read an entry in turn; what was seen that should not be."""
    wrong = []
    for turn in range(12):
        store = Store(root)
        fill(store, f"{number}-{turn}", replace=True)
        found = store.find(KEY)
        if found is None or store.damaged:
            wrong.append(f"not found: {store.damaged}")
        elif len(read(found)) != 1:
            wrong.append(f"of several writers: {read(found)}")
    return wrong


def test_readers_and_replacing_writers_never_see_half_of_each(tmp_path: Path) -> None:
    fill(Store(tmp_path), "first")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=spawn) as pool:
        found = list(pool.map(mixed, [tmp_path] * 4, range(4)))
    assert found == [[]] * 4
    store = Store(tmp_path)
    fill(store, "last", replace=True)
    assert [f.name for f in tmp_path.iterdir()] == [KEY]
    assert len(list((tmp_path / KEY).glob("files*"))) == 1


# --- what the dead leave -------------------------------------------------------------------------


def test_scratch_of_a_dead_process_without_a_lock_goes_at_once(tmp_path: Path) -> None:
    with python("import os; print(os.getpid())") as dead:
        out, _ = dead.communicate(timeout=60)
    ours = tmp_path / f".partial-{os.getpid()}-0a"
    theirs = tmp_path / f".partial-{out.strip()}-0b"
    for folder in (ours, theirs):
        folder.mkdir()
    Store(tmp_path).clean()
    assert ours.is_dir(), "it may be about to lock it"
    assert not theirs.exists()


def test_scratch_with_write_protected_folders_goes_too(tmp_path: Path) -> None:
    with Store(tmp_path).scratch() as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        (folder / "deep").chmod(0o500)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_clearing_up_leaves_nothing(tmp_path: Path) -> None:
    interrupted = """
        import shutil
        from cswap_deploy.records.store import Store
        clear = shutil.rmtree
        def struck(*given, **named):
            shutil.rmtree = clear
            raise KeyboardInterrupt
        with Store(Path(sys.argv[1])).scratch() as folder:
            (folder / "half").touch()
            shutil.rmtree = struck
    """
    with python(interrupted, tmp_path) as child:
        child.communicate(timeout=60)
    assert child.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_goes_while_another_process_looks_at_it_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / ".partial-999999999-0a"
    other.mkdir()
    (other / "lock").touch()
    make = os.mkdir

    def goes_meanwhile(path: str | Path, *given: int) -> None:
        if Path(path) == other:
            other.rmdir()
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, *given)

    ask = Path.exists

    def found_and_gone(path: Path, **how: bool) -> bool:
        there = ask(path, **how)
        if path == other / "lock":
            path.unlink()
        return there

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", goes_meanwhile)
        patch.setattr(Path, "exists", found_and_gone)
        fill(Store(tmp_path), "new")
    assert read(Store(tmp_path).find(KEY)) == {"new"}
    assert [folder.name for folder in tmp_path.iterdir()] == [KEY]


# --- cswap-deploy store --------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store with an entry of today and one that was last used forty days ago."""
    root = tmp_path / "filled"
    fill(Store(root), "new")
    fill(Store(root), "forty days", key=OTHER)
    then = time.time() - 40 * DAY
    for path in (root / OTHER / "index.json", root / OTHER):
        os.utime(path, (then, then))
    return root


def test_the_store_says_what_it_holds(command: Command, filled: Path) -> None:
    (filled / ".partial-999999999-0a").mkdir()
    told = command("store", "--store", filled, "--json").json()
    assert told["store"] == str(filled)
    assert [(e["key"], e["stage"]) for e in told["entries"]] == [(KEY, "prune"), (OTHER, "prune")]
    assert told["size_bytes"] == sum(e["size_bytes"] for e in told["entries"])
    on_disk = sum(p.stat().st_size for p in (filled / KEY).rglob("*") if p.is_file())
    assert told["entries"][0]["size_bytes"] == on_disk
    assert told["entries"][1]["age_days"] == pytest.approx(40, abs=0.1)
    assert told["entries"][1]["unused_days"] == pytest.approx(40, abs=0.1)
    assert not list(filled.glob(".partial-*")), "what the dead left is gone"
    text = command("store", "--store", filled)
    assert (text.code, "prune" in text.out, KEY[:12] in text.out) == (0, True, True)


def test_a_find_counts_as_a_use(command: Command, filled: Path) -> None:
    assert Store(filled).find(OTHER) is not None
    told = command("store", "prune", "--older-than", "30d", "--store", filled, "--json").json()
    assert told["removed"] == 0
    assert len(Store(filled).entries()) == 2


def test_what_was_not_used_for_long_is_pruned(command: Command, filled: Path) -> None:
    size = Store(filled).entries()[1].size_bytes
    done = command("store", "prune", "--older-than", "30d", "--store", filled, "--json")
    assert (done.code, done.json()["removed"], done.json()["freed_bytes"]) == (0, 1, size)
    assert [entry.key for entry in Store(filled).entries()] == [KEY]


@pytest.mark.parametrize("age", ["soon", "-1d", "0d", "nan"])
def test_an_age_that_is_none(command: Command, filled: Path, age: str) -> None:
    done = command("store", "prune", f"--older-than={age}", "--store", filled)
    assert done.code == 2
    assert f"{age!r} is no duration" in done.err
    assert len(Store(filled).entries()) == 2


def test_damaged_entries_are_named_and_can_be_removed(command: Command, filled: Path) -> None:
    assert command("store", "verify", "--store", filled).code == 0
    (filled / OTHER / "files" / "weights.bin").write_text("other")
    done = command("store", "verify", "--store", filled)
    assert (done.code, done.out) == (6, "")
    assert "1 of 2 entries" in done.err
    assert f"{OTHER[:12]} (prune): weights.bin has 5 bytes instead of 10" in done.err
    fix = f"cswap-deploy store verify --remove --store {filled}"
    assert f"fix: {fix}" in done.err
    assert command("store", "verify", "--store", filled, "--json").json()["exit_code"] == 6
    assert command(*fix.split()[1:], "--json").json() == {
        "store": str(filled), "entries": 2, "removed": 1,
    }  # fmt: skip
    assert command("store", "verify", "--store", filled).code == 0
    (filled / KEY / "index.json").write_text("{")
    done = command("store", "verify", "--store", filled)
    assert (done.code, "is not a StoreIndex" in done.err) == (6, True)


def test_a_store_that_is_not_there_is_empty(command: Command, tmp_path: Path) -> None:
    for line in ((), ("verify",), ("prune", "--older-than", "1d")):
        done = command("store", *line, "--store", tmp_path / "none")
        assert done.code == 0, done.err
    assert json.loads(command("store", "--store", tmp_path / "none", "--json").out)["entries"] == []
    assert not (tmp_path / "none").exists()
