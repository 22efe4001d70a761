"""Pictures in, classes out: a bundle on the device it was made for."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
from PIL import Image

from cswap_deploy.errors import (
    ArtifactError,
    CswapError,
    MissingDependencyError,
    UsageError,
)
from cswap_deploy.runtime.bundle import DeviceBundle, EngineFile
from cswap_deploy.runtime.preprocess import filled_up, normalise, resize_and_crop
from cswap_deploy.runtime.tensorrt_session import MODULES, TensorRtSession

ONNX_TARGETS = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
Picture = Union[str, "os.PathLike[str]", Image.Image]
_UNREADABLE = (
    OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError, ValueError,
    TypeError, IndexError,
)  # fmt: skip
"""What Pillow raises on damaged files; as in ``data.sources``."""


@dataclass(frozen=True)
class Guess:
    """One class of a picture."""

    index: int
    name: str
    probability: float


class Classifier:
    """A bundle that is loaded and ready to run."""

    def __init__(
        self, bundle: DeviceBundle, session: Any, target: str, notes: Sequence[str]
    ) -> None:
        self.bundle, self.target, self.notes = bundle, target, tuple(notes)
        self._session = session

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        target: str | None = None,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> Classifier:
        """Verify a bundle's files and load what runs best here.

        Args:
            folder: A bundle.
            target: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime``, ``onnxruntime-cuda``; unless
                said, the bundle's engine where it fits this device, else its ``model.onnx``.
            threads: Of ONNX Runtime on the CPU; the cores this process may use unless said.
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
        known = [name for name in engines if name in MODULES] + list(ONNX_TARGETS)
        if target is not None and target not in known:
            what = f"the bundle has no {target} engine"
            if target in engines:
                what = f"{target} engines are run by `cswap-deploy validate` alone"
            raise UsageError(f"{what}; the bundle runs here with {', '.join(known)}")
        if target in engines:
            session = _load_engine(bundle, engines[target], cuda_graph)
            return cls(bundle, session, target, ())
        notes = []
        if target is None:
            for name, engine in engines.items():
                try:
                    return cls(bundle, _load_engine(bundle, engine, cuda_graph), name, ())
                except (MissingDependencyError, ArtifactError) as err:
                    notes.append(f"{name} engine passed over: {str(err).splitlines()[0]}")
        from cswap_deploy.runtime.onnx_session import OnnxSession, refusals

        name = target if target is not None else "onnxruntime"
        device: Any = ONNX_TARGETS[name]
        content = bundle.read(bundle.onnx_path)
        try:
            session = OnnxSession(content, threads=threads, device=device)
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
        return cls(bundle, session, name, notes)

    @property
    def provider(self) -> str:
        """What really runs, in the runtime's words."""
        return str(self._session.provider)

    def prepare(self, picture: Picture) -> npt.NDArray[np.uint8]:
        """A picture at the network's size, (H, W, C) uint8.

        Raises:
            UsageError: It does not decode.
        """
        try:
            if isinstance(picture, Image.Image):
                return resize_and_crop(picture, self.bundle.transform)
            with Image.open(picture) as opened:
                return resize_and_crop(opened, self.bundle.transform)
        except _UNREADABLE as err:
            raise UsageError(f"cannot read {picture}: {err}") from err

    def logits(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run one batch.

        Args:
            pixels: (N, H, W, C) uint8, pictures from :meth:`prepare`.

        Returns:
            (N, classes) float32.

        Raises:
            StageError: The engine does not take this batch.
        """
        found: npt.NDArray[np.float32] = self._session.run(normalise(pixels, self.bundle.transform))
        return found

    def predict(
        self, pictures: Iterable[Picture], *, top: int = 5, batch: int = 1
    ) -> Iterator[list[Guess]]:
        """The likeliest classes of each picture, in order.

        Args:
            pictures: Files or Pillow pictures, as many as there are.
            top: Classes for each.
            batch: Pictures that run together.

        Raises:
            UsageError: A picture does not decode.
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
        """The likeliest classes of pictures that run together.

        Args:
            pixels: N pictures from :meth:`prepare`, N of 0 or more.
            top: Classes for each.

        Returns:
            N lists, the likeliest first.

        Raises:
            StageError: The engine does not take this batch.
        """
        if not pixels:
            return []
        low = getattr(self._session, "batch_min", 1)
        # The last, short batch of many.
        logits = self.logits(filled_up(np.stack(pixels), low))[: len(pixels)].astype(np.float64)
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        told = []
        for row in exponents / exponents.sum(1, keepdims=True):
            order = np.argsort(-row, kind="stable")[:top]
            told.append([Guess(int(k), self._class_name(int(k)), float(row[k])) for k in order])
        return told

    def check_batch(self, batch: int, *, pictures: int) -> None:
        """Refuse a batch that the engine's profile excludes.

        Args:
            batch: As asked for.
            pictures: That there are. Fewer than the smallest batch are filled up, not refused.

        Raises:
            UsageError: It is outside.
        """
        low = getattr(self._session, "batch_min", 1)
        high = getattr(self._session, "batch_max", batch)
        if batch < low or min(batch, pictures) > high:
            raise UsageError(
                f"a batch of {batch} is outside the profile of the {self.target} engine, {low} to "
                f"{high}",
                fix=f"--batch {min(max(batch, low), high)}, or build with --batch "
                f"{min(batch, low)}:{low}:{max(batch, high)}",
            )

    def _class_name(self, index: int) -> str:
        names = self.bundle.class_names
        return names[index] if index < len(names) else f"class {index}"


def _load_engine(bundle: DeviceBundle, engine: EngineFile, cuda_graph: bool) -> Any:
    if engine.target not in MODULES:
        raise MissingDependencyError(
            f"{engine.target} engines are run by `cswap-deploy validate`, not here"
        )
    weights = bundle.read(bundle.onnx_path) if engine.stripped else None
    return TensorRtSession(
        bundle.read(engine.path), target=engine.target, version=engine.version,
        compute_capability=engine.compute_capability,
        version_compatible=engine.version_compatible, weights=weights, cuda_graph=cuda_graph,
    )  # fmt: skip


__all__ = ["Classifier", "CswapError", "Guess"]
