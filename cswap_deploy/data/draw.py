"""Decode the chosen images, and replace those that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cswap_deploy.data.sampling import Counts, balanced_shares, interleaved, shuffled_queues
from cswap_deploy.data.sets import ImageSet, digest, image_digest
from cswap_deploy.data.sources import Decoded, Source
from cswap_deploy.errors import UsageError
from cswap_deploy.progress import Phases
from cswap_deploy.records.model import DataSpec, ModelSpec

_THREADS = 4
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A network that images are drawn for, and the seed of their choice."""

    model: ModelSpec
    seed: int
    progress: Phases


class Drawer:
    """Takes images from one source, each at most once."""

    def __init__(self, source: Source, request: Request) -> None:
        rng = np.random.default_rng(request.seed)
        self._classes = max(request.model.num_classes, 1)
        self.order: list[int] = rng.permutation(self._classes).tolist()
        """The classes; the first ones get the images that do not divide evenly."""
        self.refused = 0
        """Images left out because their digest was refused."""
        self._source, self._request = source, request
        self._queues = shuffled_queues(source.labels, request.seed)
        self._unreadable = list(source.broken)
        self._tried = len(source.broken)

    def available(self) -> Counts:
        """(K,) images of each class not taken yet."""
        left = [len(self._queues.get(c, ())) for c in range(self._classes)]
        return np.array(left, dtype=np.int64)

    def take(
        self, shares: Counts, *, part: str, refuse: frozenset[bytes] = frozenset()
    ) -> ImageSet:
        """Decode ``shares[c]`` images of each class c; every prefix is balanced by class.

        An image that does not decode, or whose digest is refused, is replaced by another of its
        class, then of any class.

        Args:
            shares: (K,) images of each class.
            part: Name of the set, for the progress.
            refuse: Digests of images that must not be taken.

        Raises:
            UsageError: More than one image in a hundred (and more than one) did not decode.
        """
        before = len(self._unreadable) if self._tried > len(self._source.broken) else 0
        taken: dict[int, list[tuple[int, Decoded]]] = {}
        self._request.progress.begin(f"decoding {part} images", int(shares.sum()))
        while shares.any():
            short = np.zeros_like(shares)
            for label, index, image in self._read(shares):
                if image is None:
                    short[label] += 1
                elif refuse and image_digest(image.pixels) in refuse:
                    short[label] += 1
                    self.refused += 1
                else:
                    taken.setdefault(label, []).append((index, image))
                    self._request.progress.advance(1)
            left = self.available()
            shares = np.minimum(short, left)
            rest = int((short - shares).sum())
            shares = shares + balanced_shares(left - shares, rest, self.order)
        self._check(allowed=max(1, self._tried // 100))
        self._request.progress.end()
        return self._image_set(taken, part, tuple(self._unreadable[before:]))

    def _read(self, shares: Counts) -> Iterator[tuple[int, int, Decoded | None]]:
        """Label, index in the source, image; None for what does not decode."""
        batch = [(c, self._queues[c].pop()) for c in self.order for _ in range(shares[c])]
        with ThreadPoolExecutor(_THREADS) as pool:  # Pillow decodes outside the interpreter's lock
            for start in range(0, len(batch), _CHUNK):
                chunk = batch[start : start + _CHUNK]
                images = pool.map(self._source.read, (index for _, index in chunk))
                for (label, index), image in zip(chunk, images, strict=True):
                    self._tried += 1
                    if isinstance(image, str):
                        self._unreadable.append(f"{self._source.describe(index)}: {image}")
                        yield label, index, None
                    else:
                        yield label, index, image
                self._check(allowed=max(20, self._tried // 50))

    def _check(self, *, allowed: int) -> None:
        bad = len(self._unreadable)
        if bad > allowed:
            names = "\n    ".join(self._unreadable[:10])
            more = f"\n    and {bad - 10} more" if bad > 10 else ""
            raise UsageError(
                f"{bad} of {self._tried} images read from {self._source.name} are unreadable "
                f"({bad / self._tried:.1%}; up to 1 % are left out):\n    {names}{more}",
                fix="remove or replace these files",
            )

    def _image_set(
        self,
        taken: dict[int, list[tuple[int, Decoded]]],
        part: str,
        unreadable: tuple[str, ...],
    ) -> ImageSet:
        ordered = interleaved(taken, self.order)
        channels, height, width = self._request.model.preprocessing.input_size
        images = np.empty((len(ordered), height, width, channels), dtype=np.uint8)
        for position, (_, (_, image)) in enumerate(ordered):
            images[position] = image.pixels
        labels = np.array([label for label, _ in ordered], dtype=np.int64)
        mapping, targets = self._source.mapping, self._source.targets
        if targets is not None:
            targets = targets[[index for _, (index, _) in ordered]]
        labelled = self._source.labelled
        odd = Counter(what for _, (_, image) in ordered for what in image.oddities)
        told = (f"{n} of {len(ordered)} {part} images {what}" for what, n in sorted(odd.items()))
        spec = DataSpec(
            source=self._source.name, sha256=digest(images, labels, targets), count=len(ordered),
            classes=len(taken) if labelled else 0, mapping=mapping.words,
            class_indices=mapping.indices, labelled=labelled, unreadable=unreadable,
            notes=(*self._source.notes, *told),
        )  # fmt: skip
        return ImageSet(images, labels, spec, targets)
