"""Pictures in, classes out: a bundle on the device it was made for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from PIL import Image

from cswap_deploy.errors import ArtifactError, MissingDependencyError, UsageError
from cswap_deploy.runtime.bundle import DeviceBundle, EngineFile
from cswap_deploy.runtime.preprocess import (
    UNREADABLE,
    filled_up,
    normalise,
    oddities,
    open_picture,
    resize_and_crop,
)
from cswap_deploy.runtime.probabilities import to_logits, to_probabilities
from cswap_deploy.runtime.session import Session
from cswap_deploy.runtime.tensorrt_session import MODULES, TensorRtSession

ONNX_TARGETS = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
Picture = Union[str, "os.PathLike[str]", Image.Image]


@dataclass(frozen=True)
class Guess:
    """One class of a picture."""

    index: int
    name: str
    probability: float


class Classifier:
    """A bundle that is loaded and ready to run."""

    def __init__(
        self, bundle: DeviceBundle, session: Session, target: str, notes: Sequence[str] = ()
    ) -> None:
        self.bundle, self.target, self.notes = bundle, target, tuple(notes)
        self.oddities: Counter[str] = Counter()
        """What a user may want to know of how pictures were taken -> how many; see
        :func:`~cswap_deploy.runtime.preprocess.oddities`."""
        self._session = session

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, target: str | None = None,
        threads: int | None = None, cuda_graph: bool = False,
    ) -> Classifier:  # fmt: skip
        """Verify a bundle's files and load what runs best here.

        Args:
            folder: A bundle.
            target: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime``, ``onnxruntime-cuda``; by
                default the bundle's engine if it fits this device, else its ``model.onnx``.
            threads: Threads of ONNX Runtime on the CPU; the process's cores by default.
            cuda_graph: Replay an engine's work as a CUDA graph.

        Returns:
            The classifier; ``notes`` say why an engine was passed over.

        Raises:
            ArtifactError: A file is damaged, or the target's engine does not fit this device.
            MissingDependencyError: A runtime or a GPU is not there.
            UsageError: The bundle has no such target.
        """
        bundle = DeviceBundle.open(Path(folder))
        engines = {e.target: e for e in bundle.engines if e.path != bundle.onnx_path}
        _check_target(target, engines)
        notes = []
        for name, engine in engines.items():
            if target in (None, name):
                try:
                    return cls(bundle, load_engine(bundle, engine, cuda_graph=cuda_graph), name)
                except (MissingDependencyError, ArtifactError) as err:
                    if target is not None:
                        raise
                    notes.append(f"{name} engine passed over: {str(err).splitlines()[0]}")
        name = target or "onnxruntime"
        return cls(bundle, _load_graph(bundle, name, threads, notes), name, notes)

    @property
    def provider(self) -> str:
        """What really executes, asked of the runtime."""
        return self._session.provider

    def prepare(self, picture: Picture) -> npt.NDArray[np.uint8]:
        """A picture at the network's size, (H, W, C) uint8.

        Raises:
            UsageError: It does not decode.
        """
        try:
            if isinstance(picture, Image.Image):
                return self._prepared(picture)
            with open_picture(picture) as opened:
                return self._prepared(opened)
        except UNREADABLE as err:
            raise UsageError(f"cannot read {picture}: {err}") from err

    def _prepared(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        self.oddities.update(oddities(picture, self.bundle.transform))
        return resize_and_crop(picture, self.bundle.transform)

    def logits(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run one batch of pictures from :meth:`prepare`: (N, H, W, C) -> (N, classes).

        Of a network that gives probabilities these are their logarithms.

        Raises:
            StageError: The engine does not take this batch.
        """
        return to_logits(self._outputs(pixels), self.bundle.output_kind)

    def run(self, pictures: Sequence[Picture]) -> dict[str, npt.NDArray[Any]]:
        """Every output of one batch of N > 0 pictures, by name, whatever the task: (N, ...) each.

        Raises:
            UsageError: A picture does not decode.
            StageError: The engine does not take this batch.
        """
        return self.outputs([self.prepare(picture) for picture in pictures])

    def outputs(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> dict[str, npt.NDArray[Any]]:
        """The same of pictures from :meth:`prepare`."""
        batch = filled_up(np.stack(pixels), self._session.batch_min)
        found = self._session.named(normalise(batch, self.bundle.transform))
        # The last batch of many may be a short one.
        return {
            name: value[: len(pixels)] if name in self.bundle.rows else value
            for name, value in found.items()
        }

    def predict(
        self, pictures: Iterable[Picture], *, top: int = 5, batch: int = 1
    ) -> Iterator[list[Guess]]:
        """The ``top`` likeliest classes of each picture, in order; ``batch`` of them run together.

        Raises:
            UsageError: A picture does not decode, or the network does not classify.
            StageError: The engine does not take this batch.
        """
        waiting: list[npt.NDArray[np.uint8]] = []
        for picture in pictures:
            waiting.append(self.prepare(picture))
            if len(waiting) == batch:
                yield from self.classify(waiting, top=top)
                waiting = []
        yield from self.classify(waiting, top=top)

    def classify(self, pixels: Sequence[npt.NDArray[np.uint8]], *, top: int) -> list[list[Guess]]:
        """The ``top`` likeliest classes of each of N >= 0 pictures that run together.

        Raises:
            UsageError: The network does not classify.
            StageError: The engine does not take this batch.
        """
        if self.bundle.task != "classify":
            raise UsageError(
                f"{self.bundle.model} is of task {self.bundle.task}: it has no classes to name",
                fix="take its outputs: .run(pictures), or cswap-run BUNDLE PICTURES -o FILE.npz",
            )
        if not pixels:
            return []
        # The last batch of many may be a short one.
        batch = filled_up(np.stack(pixels), self._session.batch_min)
        outputs = self._outputs(batch)[: len(pixels)]
        told = []
        for row in to_probabilities(outputs, self.bundle.output_kind):
            order = np.argsort(-row, kind="stable")[:top]
            told.append([Guess(int(k), self._class_name(int(k)), float(row[k])) for k in order])
        return told

    def check_batch(self, batch: int, *, pictures: int) -> None:
        """Refuse a batch (samples) that the engine's profile excludes, with a ``UsageError``.

        Fewer ``pictures`` in all than the smallest batch are filled up.
        """
        low, most = self._session.batch_min, self._session.batch_max
        high = batch if most is None else most
        if batch < low or min(batch, pictures) > high:
            raise UsageError(
                f"a batch of {batch} is outside the profile of the {self.target} engine, {low} to "
                f"{high}",
                fix=f"--batch {min(max(batch, low), high)}, or build with --batch "
                f"{min(batch, low)}:{low}:{max(batch, high)}",
            )

    def _outputs(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """What the network itself gives, (N, classes)."""
        return self._session.run(normalise(pixels, self.bundle.transform))

    def _class_name(self, index: int) -> str:
        names = self.bundle.class_names
        return names[index] if index < len(names) else f"class {index}"


def _check_target(target: str | None, engines: Mapping[str, EngineFile]) -> None:
    """Refuse a target that this bundle cannot run with here."""
    known = [name for name in engines if name in MODULES] + list(ONNX_TARGETS)
    if target is not None and target not in known:
        what = f"the bundle has no {target} engine"
        if target in engines:
            what = f"{target} engines are run by `cswap-deploy validate` alone"
        raise UsageError(f"{what}; the bundle runs here with {', '.join(known)}")


def load_engine(bundle: DeviceBundle, engine: EngineFile, *, cuda_graph: bool) -> Session:
    """Verify and load one of a bundle's TensorRT engines.

    Raises:
        MissingDependencyError: The target has no runtime here, or a package or the GPU is absent.
        ArtifactError: A file is damaged, or the engine does not fit this device.
    """
    if engine.target not in MODULES:
        raise MissingDependencyError(
            f"{engine.target} engines are run by `cswap-deploy validate`, not here"
        )
    weights = bundle.read(bundle.onnx_path) if engine.stripped else None
    plan = bundle.read(engine.path)
    return TensorRtSession(plan, engine, weights=weights, cuda_graph=cuda_graph)


def _load_graph(
    bundle: DeviceBundle, target: str, threads: int | None, notes: Sequence[str]
) -> Session:
    """``model.onnx`` in ONNX Runtime; ``notes`` say why engines were passed over."""
    from cswap_deploy.runtime.onnx_session import OnnxSession, refusals

    device: Any = ONNX_TARGETS[target]
    content = bundle.read(bundle.onnx_path)
    try:
        return OnnxSession(content, threads=threads, device=device)
    except MissingDependencyError as err:
        if not notes:
            raise
        words = "; ".join([*notes, str(err).splitlines()[0]])
        raise MissingDependencyError(words, fix=err.fix) from err
    except refusals() as err:
        words = f"onnxruntime does not load {bundle.folder / bundle.onnx_path}: {err}"
        if bundle.precision == "bf16" and device == "cpu":
            words = "onnxruntime has no bf16 on CPUs: the graph runs in a TensorRT engine alone"
        raise ArtifactError("; ".join([*notes, words])) from err
