"""What is measured on this machine: engines of bundles, and plain ONNX files."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from cswap_deploy.errors import ArtifactError, StageError, UsageError
from cswap_deploy.measure.paired import Contender
from cswap_deploy.records.bundle import DENSE, verify_bundle
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.runtime.session import Floats, Session
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest, get_target

_GIT = "git:"


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine on this disk."""

    label: str
    path: Path
    """The bundle, or the ONNX file."""
    engine: EngineArtifact
    onnx: Path
    input_size: tuple[int, ...]
    """(C, H, W)."""
    manifest: Manifest | None = None
    """Of a bundle."""

    @property
    def target(self) -> str:
        """The runtime."""
        return self.engine.target

    @property
    def size_bytes(self) -> int:
        """Of the engine's file."""
        return self.engine.size_bytes

    def contender(self, *, batch: int, threads: int | None) -> Contender:
        """The same, ready to be timed at a batch, on normal noise."""
        return Contender(
            self.label, lambda: self.load(threads=threads, batch=batch), self.images(batch)
        )

    def load(self, *, threads: int | None, batch: int) -> Session:
        """An engine that takes the batch.

        Raises:
            MissingDependencyError: The runtime or the device is not there.
            ArtifactError: The engine is damaged, or does not fit this device.
            StageError: Its profile excludes the batch.
        """
        session = get_target(self.target).load(self.engine, threads=threads, onnx=self.onnx)
        most = session.batch_max
        if batch < session.batch_min or (most is not None and batch > most):
            session.close()
            raise StageError(
                f"a batch of {batch} is outside the profile of {self.label}, "
                f"{session.batch_min} to {most}",
                fix=f"--batch {session.batch_min}, or build with a wider --batch",
            )
        return session

    def images(self, batch: int) -> Floats:
        """(batch, C, H, W) of normal noise: what a call takes does not depend on what it shows."""
        rng = np.random.default_rng(0)
        return rng.standard_normal((batch, *self.input_size), dtype=np.float32)


def open_subject(
    path: Path, scratch: Path, *, target: str | None = None, batch: int = 1, label: str = ""
) -> Subject:
    """Read a bundle, whose files are held against their digests, or an ONNX file.

    Args:
        path: Of it.
        scratch: Folder for engines that are built of ONNX files.
        target: The bundle's first engine that ran where it was built, unless given; ``onnxruntime``
            for an ONNX file.
        batch: Largest that an engine built here takes.
        label: Its name; the path unless given.

    Raises:
        UsageError: There is nothing, or the bundle has no such engine.
        ArtifactError: It is damaged.
        BuildError: The runtime refuses an ONNX file.
    """
    label = label or str(path)
    if path.is_dir():
        return _of_bundle(path, target, label)
    if not path.exists():
        raise UsageError(f"{path} does not exist", fix="name a bundle, or an ONNX file")
    from cswap_deploy.export.onnx import describe_onnx

    graph = describe_onnx(path)
    size = tuple(graph.inputs[0].shape[1:])
    if len(graph.inputs) != 1 or not size or any(isinstance(n, str) for n in size):
        shown = ", ".join(f"{t.name} {list(t.shape)}" for t in graph.inputs)
        raise UsageError(
            f"{path} takes {shown}; one input of a known size is wanted, (batch, C, H, W)"
        )
    adapter = get_target(target or "onnxruntime")
    fixed = graph.inputs[0].shape[0]
    if isinstance(fixed, int) and fixed != batch:
        raise UsageError(
            f"{path} takes batches of {fixed} alone, not {batch}", fix=f"--batch {fixed}"
        )
    sizes = BatchRange(min=batch if isinstance(fixed, int) else 1, opt=batch, max=batch)
    folder = scratch / f"{len(list(scratch.iterdir()))}"
    folder.mkdir()
    engine = adapter.build(BuildRequest(graph, sizes, folder))
    return Subject(label, path, engine, path, tuple(int(n) for n in size))


def dense_subject(bundle: Subject, scratch: Path, *, batch: int) -> Subject | None:
    """The dense network of a bundle on the same runtime, where the bundle has its graph."""
    graph = bundle.path / DENSE
    if bundle.manifest is None or not bundle.manifest.lists(DENSE):
        return None
    return open_subject(graph, scratch, target=bundle.target, batch=batch, label="dense")


def fetched(place: str, scratch: Path, *, near: Path) -> Path:
    """The folder of a baseline: a path, or ``git:REF:PATH`` taken out of a repository.

    Args:
        place: Relative paths are from ``near``.
        scratch: Folder for what git holds.
        near: A folder, inside the repository for ``git:``.

    Raises:
        UsageError: It is not there.
    """
    if not place.startswith(_GIT):
        path = Path(place).expanduser()
        path = path if path.is_absolute() else near / path
        if not path.exists():
            raise UsageError(
                f"there is no baseline at {path}",
                fix="build it there, take the right path, or store it in git: 'git:main:PATH'",
            )
        return path
    ref, _, inside = place.removeprefix(_GIT).partition(":")
    if not ref or not inside or ref.startswith("-") or inside.startswith("-"):
        raise UsageError(f"{place!r} is no baseline", fix="git:REF:PATH, as git:main:bundles/net")
    line = ["git", "-C", str(near), "archive", "--format=tar", f"{ref}:./{inside}"]
    try:
        done = subprocess.run(line, capture_output=True, check=False)
    except OSError as err:
        raise UsageError(f"git does not run: {err}", fix="name the baseline by a path") from err
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise UsageError(
            f"git has no {inside} at {ref}: {words[-1] if words else 'no reason given'}",
            fix=f"git fetch, and see `git ls-tree {ref}`; in CI check out with the whole history",
        )
    folder = scratch / "baseline"
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _of_bundle(path: Path, target: str | None, label: str) -> Subject:
    manifest = verify_bundle(path).manifest
    engines = {result.engine.target: result.engine for result in manifest.targets}
    ran: Sequence[str] = [name for name, engine in engines.items() if engine.runnable]
    name = target or next(iter(ran or engines), None)
    if name not in engines:
        raise UsageError(
            f"{path} has no engine for {name or 'any target'}; it has: "
            f"{', '.join(engines) or 'none'}",
            fix="pass one of them with --target, or build with this --target",
        )
    engine = engines[name].model_copy(update={"path": path / engines[name].path})
    if not engine.path.is_file():
        raise ArtifactError(f"{engine.path} is missing", fix="build the bundle again")
    size = manifest.model.preprocessing.input_size
    onnx = path / manifest.onnx.path
    return Subject(label, path, engine, onnx, tuple(size), manifest)
