"""What ``cswap-run`` makes of bundles that mean harm: exit 6, at once, without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made_up_bundle import reseal
from small_bundle import Engine, picture, write_bundle

from cswap_deploy.errors import ArtifactError
from cswap_deploy.runtime.bundle import DeviceBundle
from cswap_deploy.runtime.cli import main
from cswap_deploy.runtime.documents import read_regular
from cswap_deploy.runtime.profiling import profile

if TYPE_CHECKING:
    from conftest import Made

pytest.importorskip("onnxruntime")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "a.png")
    return write_bundle(tmp_path / "bundle", Engine("tensorrt", b"plan", "11.4.0.106"))


def refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(bundle), str(bundle.parent / "a.png")]) == 6
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    return said.err


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def elsewhere(path: Path) -> None:
    outside = path.parents[1] / f"outside-{path.name}"
    outside.write_bytes(path.parent.joinpath(".kept").read_bytes())
    path.symlink_to(outside)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
@pytest.mark.parametrize("put", [pipe, endless, elsewhere, Path.mkdir])
def test_what_is_no_file_of_the_bundle_is_not_read(
    bundle: Path, capsys: pytest.CaptureFixture[str], name: str, put: Callable[[Path], None]
) -> None:
    (bundle / name).rename(bundle / ".kept")
    put(bundle / name)
    said = refused(bundle, capsys)
    assert f"{bundle / name} " in said
    assert "is no regular file" in said or "leads out of" in said


def test_a_folder_that_is_a_link_out_of_the_bundle(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", Engine("tensorrt", b"plan", "11.4.0.106"))
    (bundle / "engine").rename(tmp_path / "engine")
    (bundle / "engine").symlink_to(tmp_path / "engine")
    with pytest.raises(ArtifactError, match="leads out of"):
        DeviceBundle.open(bundle).read("engine/tensorrt/model.plan")


def test_a_bundle_behind_a_link_is_read(bundle: Path) -> None:
    (bundle.parent / "latest").symlink_to(bundle)
    assert DeviceBundle.open(bundle.parent / "latest").read("model.onnx")


def test_no_more_is_read_than_is_recorded(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (bundle / "model.onnx").open("r+b") as file:
        file.truncate(1 << 40)
    assert "1,099,511,627,776 bytes, recorded" in refused(bundle, capsys)
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(read_regular, "__kwdefaults__", {"within": None, "most": 1 << 20})
    assert "manifest.json has more than 1,048,576 bytes" in refused(bundle, capsys)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("files.0.sha256", -1), ("files.0.sha256", "A" * 64), ("files.0.size_bytes", -1),
        ("files.0.size_bytes", 1.5), ("files.0.size_bytes", True), ("files.0.path", 3),
        ("files.0.path", "a/./b"), ("files.0.path", ""), ("files.0.path", "a\0b"), ("files", {}),
        ("onnx.precision", 3), ("onnx.outputs.0.shape", "batch"), ("onnx.inputs", 1),
        ("model.preprocessing.input_size", [3, 0, 16]),
        ("model.preprocessing.input_size", [3, 16]),
        ("model.preprocessing.input_size", [3, 60000, 60000]),
        ("model.preprocessing.input_size", [3, 16.5, 16]),
        ("model.preprocessing.input_size", [4, 16, 16]),
        ("model.preprocessing.resize_shorter", 60000),
        ("model.preprocessing.resize_shorter", 0), ("model.preprocessing.resize_shorter", "18"),
        ("model.preprocessing.std", [0, 0, 0]), ("model.preprocessing.std", [1e-300, 1, 1]),
        ("model.preprocessing.std", [-1, 1, 1]), ("model.preprocessing.std", [1, 1]),
        ("model.preprocessing.mean", [float("nan"), 0, 0]),
        ("model.preprocessing.mean", [float("inf"), 0, 0]),
        ("model.preprocessing.mean", [1e300, 0, 0]), ("model.preprocessing.mean", None),
        ("model.preprocessing.mean", [10**400, 0, 0]),
        ("model.preprocessing.interpolation", "lanczos"),
        ("model.preprocessing.exif_rotate", "yes"),
        ("model.class_names", [1]), ("model.class_names", "cat"), ("model.task", "run"),
        ("model.output_kind", "sums"), ("model.name", None), ("model.unknown", 1),
        ("model.arguments", {"checkpoint_path": "/etc/passwd"}),
        ("targets.0.engine.versions", []), ("targets.0.engine.stripped", "no"),
        ("targets.0.engine.path", ["model.onnx"]), ("targets.0.engine.options", []),
        ("targets.0.latency", {}), ("device.cpu", {}), ("created", 0), ("stages", {"a": "b"}),
        ("settings", []), ("schema_version", 5.0), ("schema_version", True),
        ("schema_version", "5"), ("schema_version", 10**30), ("seal", None),
    ],
)  # fmt: skip
def test_a_value_of_another_kind(
    bundle: Path, capsys: pytest.CaptureFixture[str], where: str, value: Any
) -> None:
    told = json.loads((bundle / "manifest.json").read_text())
    *steps, last = where.split(".")
    inner = told
    for step in steps:
        inner = inner[int(step) if step.isdigit() else step]
    inner[last] = value
    if where == "seal":
        (bundle / "manifest.json").write_text(json.dumps(told))
    else:
        reseal(bundle / "manifest.json", told)
    assert "manifest.json" in refused(bundle, capsys)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000, b'{"a":' * 200_000, b'{"schema_version": 4, "model": ' + b"[" * 500,
        b'{"schema_version": 4, "schema_version": 4}', b'{"schema_version": Infinity}',
        b'{"schema_version": ' + b"1" * 6000 + b"}", b'{"schema_version": 1e400}',
        b'"' + b"x" * 1000 + b'"', b"null", b"\xef\xbb\xbf{}", b'{"a": "\\ud800"}',
    ],
)  # fmt: skip
def test_json_with_surprises(
    bundle: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (bundle / "manifest.json").write_bytes(content)
    assert len(refused(bundle, capsys)) < 500


def test_every_value_replaced_by_others_or_removed(bundle: Path) -> None:
    """Whatever stands anywhere: the bundle opens, or is refused in words."""
    told = json.loads((bundle / "manifest.json").read_text())
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and len(places) < 400:
                collect(node[key])

    collect(told)
    for node, key in places:
        kept = node[key]
        for other in (None, -1, 2**62, 0.5, "", "text", [], [None], {}, {"a": 1}, True):
            node[key] = other
            reseal(bundle / "manifest.json", told)
            with suppress(ArtifactError):
                DeviceBundle.open(bundle)
        if isinstance(node, dict):
            del node[key]
            reseal(bundle / "manifest.json", told)
            with suppress(ArtifactError):
                DeviceBundle.open(bundle)
        node[key] = kept


def test_a_flipped_byte_in_any_file_is_refused_by_name(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a real bundle; what is not needed to run it may be absent, but not altered."""
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    picture(0).save(tmp_path / "a.png")
    names = [p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()]
    assert len(names) >= 8
    for name in names:
        content = (copy / name).read_bytes()
        changed = bytearray(content)
        changed[len(content) // 3] ^= 2
        (copy / name).write_bytes(changed)
        assert name in refused(copy, capsys)
        (copy / name).write_bytes(content)
    for name in ("pruned.safetensors", "report.html"):
        (copy / name).unlink()
    assert main([str(copy), str(tmp_path / "a.png")]) == 0


def test_one_flipped_bit_in_the_command_itself(bundle: Path) -> None:
    content = bytearray((bundle / "manifest.json").read_bytes())
    content[len(content) // 2] ^= 4
    (bundle / "manifest.json").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "cswap_deploy.runtime.cli", bundle, bundle.parent / "a.png"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 6
    assert f"cannot read {bundle / 'manifest.json'}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("put", [pipe, endless, lambda path: path.write_bytes(b"[" * 100_000)])
def test_a_kit_is_read_as_carefully(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "kit.json")
    with pytest.raises(ArtifactError, match=r"kit\.json"):
        profile(tmp_path, target="onnxruntime", threads=1)
