"""Stages are found by content, and a write is whole or absent, whatever kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from small_disks import mounted

from cswap_deploy.errors import MissingDependencyError, UsageError
from cswap_deploy.records.files import _swap, atomic_folder, check_output, write_atomic
from cswap_deploy.records.store import Store, stage_key

KEY = "k" * 64


def fill(store: Store, key: str = KEY, text: str = "weights") -> None:
    with store.create(key) as folder:
        (folder / "a.bin").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_text("more")


def fail_in(block: AbstractContextManager[Path], failure: BaseException) -> None:
    with block as folder:
        (folder / "manifest.json").write_text("half")
        raise failure


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "small", "size=256k")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "read-only", "size=64k", "ro")


# --- keys ----------------------------------------------------------------------------------------


def test_the_key_changes_with_everything_that_shapes_the_result() -> None:
    base = {
        "stage": "export",
        "version": 1,
        "inputs": {"weights": "abc"},
        "settings": {"opset": 18, "batch": 4},
        "tools": {"torch": "2.13.0"},
    }
    changed = [
        {"stage": "simplify"},
        {"version": 2},
        {"inputs": {"weights": "abd"}},
        {"settings": {"opset": 19, "batch": 4}},
        {"tools": {"torch": "2.13.1"}},
    ]
    keys = {stage_key(**(base | change)) for change in [{}, *changed]}  # type: ignore[arg-type]
    assert len(keys) == 1 + len(changed)
    reordered = base | {"settings": {"batch": 4, "opset": 18}}
    assert stage_key(**reordered) == stage_key(**base)  # type: ignore[arg-type]


def test_the_root_is_told_or_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "env"))
    assert Store().root == tmp_path / "env"
    assert Store(tmp_path / "told").root == tmp_path / "told"
    monkeypatch.delenv("CSWAP_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().root == tmp_path / "cache" / "cswap-deploy"


# --- entries -------------------------------------------------------------------------------------


def test_an_entry_is_found_after_it_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.find(KEY) is None
    fill(store)
    found = store.find(KEY)
    assert found is not None
    assert (found / "a.bin").read_text() == "weights"
    assert (found / "sub" / "b.bin").read_text() == "more"
    assert names(store.root) == [KEY]
    assert store.find("0" * 64) is None
    assert store.damaged == []


def flip_a_byte(files: Path) -> None:
    data = bytearray((files / "a.bin").read_bytes())
    data[0] ^= 1
    (files / "a.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "a.bin has sha256 "),
        (lambda files: (files / "a.bin").write_text("w"), "a.bin has 1 bytes instead of 7"),
        (lambda files: (files / "sub" / "b.bin").unlink(), "sub/b.bin is missing"),
        (lambda files: (files / "c.bin").touch(), "c.bin was not there when it was made"),
        (lambda files: (files.parent / "index.json").write_text("{"), "is not a StoreIndex"),
        (lambda files: (files.parent / "index.json").unlink(), "does not exist"),
    ],
    ids=["flipped", "cut", "missing", "extra", "index damaged", "no index"],
)
def test_a_damaged_entry_is_set_aside_reported_and_made_again(
    tmp_path: Path, damage: object, words: str
) -> None:
    store = Store(tmp_path)
    fill(store)
    damage(store.root / KEY / "files")  # type: ignore[operator]
    assert store.find(KEY) is None
    assert len(store.damaged) == 1
    assert store.damaged[0].startswith("store entry kkkkkkkkkkkk was damaged and is made again: ")
    assert words in store.damaged[0]
    assert names(store.root) == []
    fill(store)
    assert store.find(KEY) is not None


def test_an_entry_under_another_key_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    (tmp_path / KEY).rename(tmp_path / ("j" * 64))
    assert store.find("j" * 64) is None
    assert "its index is of kkkk" in store.damaged[0]


@pytest.mark.parametrize("failure", [ValueError("refused"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    store = Store(tmp_path / "deep" / "store")
    with pytest.raises(type(failure)):
        fail_in(store.create(KEY), failure)
    assert names(tmp_path) == []


def test_of_two_writers_one_wins_and_both_are_content(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.create(KEY) as slow:
        fill(Store(tmp_path), text="first")
        (slow / "a.bin").write_text("second")
    found = store.find(KEY)
    assert found is not None
    assert (found / "a.bin").read_text() == "first"
    assert names(tmp_path) == [KEY]


def test_many_writers_at_once_leave_one_sound_entry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: fill(Store(tmp_path), text=str(i)), range(24)))
    store = Store(tmp_path)
    assert store.find(KEY) is not None
    assert store.damaged == []
    assert names(tmp_path) == [KEY]


def test_a_writer_replaces_an_entry_that_was_damaged_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.create(KEY) as slow:
        fill(Store(tmp_path), text="first")
        flip_a_byte(tmp_path / KEY / "files")
        (slow / "a.bin").write_text("second")
    found = store.find(KEY)
    assert found is not None
    assert (found / "a.bin").read_text() == "second"


def killed_in(block: str) -> None:
    """Run code in a process of its own, and kill it once it says that it is in the block."""
    code = "from pathlib import Path\nimport time\n" + textwrap.dedent(block)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"inside\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_a_killed_writer_leaves_no_entry_and_its_rest_is_cleared(tmp_path: Path) -> None:
    killed_in(f"""
        from cswap_deploy.records.store import Store
        with Store(Path({str(tmp_path)!r})).create({KEY!r}) as folder:
            (folder / "half").write_text("half")
            print("inside", flush=True)
            time.sleep(60)
    """)
    store = Store(tmp_path)
    assert store.find(KEY) is None
    assert len(names(tmp_path)) == 1
    assert names(tmp_path)[0].startswith(".partial-")
    fill(store, "j" * 64)
    assert names(tmp_path) == ["j" * 64]


def test_a_living_writer_is_not_cleared(tmp_path: Path) -> None:
    with Store(tmp_path).create(KEY) as folder:
        (folder / "half").write_text("half")
        fill(Store(tmp_path), "j" * 64)
        assert (folder / "half").read_text() == "half"
    assert Store(tmp_path).find(KEY) is not None


# --- the disk ------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    with (
        pytest.raises(MissingDependencyError, match="is full: more than ") as caught,
        store.create(KEY) as folder,
    ):
        (folder / "big").write_bytes(bytes(1 << 20))
    assert "bytes are needed there and 0 more are free (No space left on device)" in str(
        caught.value
    )
    assert str(caught.value).endswith(
        "fix: free some space, or choose a folder on another disk with --store"
    )
    assert caught.value.exit_code == 4
    assert names(small_disk) == []
    fill(store)
    assert store.find(KEY) is not None


def test_a_full_disk_is_known_in_the_words_of_a_library(small_disk: Path) -> None:
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"weight": numpy.zeros(1 << 18, dtype=numpy.float32)}
    with (
        pytest.raises(MissingDependencyError, match="is full"),
        atomic_folder(small_disk / "bundle") as folder,
    ):
        safetensors.save_file(tensors, folder / "pruned.safetensors")
    assert names(small_disk) == []


def test_a_read_only_output_is_said(read_only_disk: Path) -> None:
    for use in (check_output, lambda path: atomic_folder(path).__enter__()):
        with pytest.raises(UsageError) as caught:
            use(read_only_disk / "bundle")
        assert str(caught.value) == (
            f"cannot use {read_only_disk}: Read-only file system\n"
            "  fix: choose a folder that you may write, with -o"
        )
    with pytest.raises(UsageError, match=r"Read-only file system\n  fix: .*--store"):
        fill(Store(read_only_disk / "store"))


def test_an_output_without_permission_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(UsageError, match="Permission denied"):
        check_output(tmp_path / "bundle")
    tmp_path.chmod(0o700)


# --- the bundle's folder -------------------------------------------------------------------------


def write_bundle(target: Path, text: str) -> None:
    with atomic_folder(target) as folder:
        assert folder.parent.parent == target.parent
        (folder / "manifest.json").write_text(text)


def test_a_folder_appears_whole_and_replaces_a_bundle(tmp_path: Path) -> None:
    target = tmp_path / "out" / "bundle"
    write_bundle(target, "one")
    assert (target / "manifest.json").read_text() == "one"
    (target / "old-file").touch()
    write_bundle(target, "two")
    assert names(target) == ["manifest.json"]
    assert (target / "manifest.json").read_text() == "two"
    assert names(target.parent) == ["bundle"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle", "one")
    assert names(tmp_path / "bundle") == ["manifest.json"]


@pytest.mark.parametrize("failure", [OSError("refused"), KeyboardInterrupt()])
def test_an_interrupted_bundle_leaves_what_was_there(
    tmp_path: Path, failure: BaseException
) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "one")
    with pytest.raises(type(failure)):
        fail_in(atomic_folder(target), failure)
    assert (target / "manifest.json").read_text() == "one"
    assert names(tmp_path) == ["bundle"]
    with pytest.raises(type(failure)):
        fail_in(atomic_folder(tmp_path / "new" / "deep"), failure)
    assert names(tmp_path) == ["bundle"]


def test_a_killed_bundle_leaves_what_was_there_and_its_rest_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "one")
    killed_in(f"""
        from cswap_deploy.records.files import atomic_folder
        with atomic_folder(Path({str(target)!r})) as folder:
            (folder / "manifest.json").write_text("two")
            print("inside", flush=True)
            time.sleep(60)
    """)
    assert (target / "manifest.json").read_text() == "one"
    assert len(names(tmp_path)) == 2
    check_output(target)
    assert names(tmp_path) == ["bundle"]


def test_a_bundle_that_was_moved_aside_when_the_kill_came_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "one")
    killed_in(f"""
        import cswap_deploy.records.files as files
        def stop(new, target, *, old):
            target.rename(old)
            print("inside", flush=True)
            time.sleep(60)
        files._swap = stop
        with files.atomic_folder(Path({str(target)!r})) as folder:
            (folder / "manifest.json").write_text("two")
    """)
    assert not target.exists()
    check_output(target)
    assert (target / "manifest.json").read_text() == "one"
    assert names(tmp_path) == ["bundle"]


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "photos"
    target.mkdir()
    (target / "cat.jpg").touch()
    for use in (check_output, lambda path: atomic_folder(path).__enter__()):
        with pytest.raises(UsageError) as caught:
            use(target)
        assert str(caught.value) == (
            f"{target} is not empty and is not a bundle (it has no manifest.json); "
            "it is left as it is\n  fix: choose another folder with -o"
        )
    assert names(tmp_path) == ["photos"]
    assert names(target) == ["cat.jpg"]


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file; a bundle is a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot use .*file"):
        check_output(tmp_path / "file" / "bundle")


def test_a_mount_point_as_output_is_refused(small_disk: Path) -> None:
    with pytest.raises(UsageError, match=r"is a mount point.*\n  fix: -o .*/small/bundle"):
        check_output(small_disk)


class Unseen(type(Path())):  # type: ignore[misc]
    """A path whose folder another process makes just after this one looked."""

    def exists(self, **_: bool) -> bool:
        return False


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "theirs")
    (tmp_path / "new").mkdir()
    with pytest.raises(UsageError, match=r"another process wrote .*its folder is kept\n  fix: run"):
        _swap(tmp_path / "new", Unseen(tmp_path / "bundle"), old=tmp_path / "old")
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "theirs"


def test_checking_the_output_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "bundle")
    assert names(tmp_path) == []


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["report.md"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
