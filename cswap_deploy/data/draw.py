"""Decode the images that were chosen, and replace those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cswap_deploy.data.sampling import Counts, balanced_shares, shuffled_queues
from cswap_deploy.data.sets import ImageSet, Pixels, digest, image_digest
from cswap_deploy.data.sources import Source, UnreadableError
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import DataSpec, ModelSpec

Progress = Callable[[int, int, str], None]
_THREADS = 4
_CHUNK = 64


@dataclass(slots=True)
class Drawer:
    """Takes images from one source, each at most once."""

    source: Source
    model: ModelSpec
    seed: int
    progress: Progress | None = None
    queues: dict[int, list[int]] = field(init=False)
    order: list[int] = field(init=False)
    """Which classes get the images that do not divide evenly."""
    tried: int = field(init=False)
    unreadable: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.queues = shuffled_queues(self.source.labels, self.seed)
        rng = np.random.default_rng(self.seed)
        self.order = rng.permutation(self.model.num_classes).tolist()
        self.unreadable = list(self.source.broken)
        self.tried = len(self.unreadable)

    def available(self) -> Counts:
        """(K,) images of each class not taken yet."""
        counts = np.zeros(self.model.num_classes, dtype=np.int64)
        for label, queue in self.queues.items():
            counts[label] = len(queue)
        return counts

    def take(self, shares: Counts, *, refuse: frozenset[bytes], what: str) -> tuple[ImageSet, int]:
        """Decode ``shares[c]`` images of each class c.

        One that does not decode, or whose digest is refused, is replaced by another of its class,
        then of any class.

        Returns:
            The images, so ordered that every beginning of the set is balanced too, and how many
            were left out because their digest was refused.

        Raises:
            UsageError: More than one image in a hundred (and more than one) did not decode.
        """
        before = len(self.unreadable) if self.tried > len(self.source.broken) else 0
        wanted, refused = int(shares.sum()), 0
        taken: dict[int, list[Pixels]] = {}
        while shares.any():
            batch = [
                (label, self.queues[label].pop())
                for label in self.order
                for _ in range(int(shares[label]))
            ]
            short = np.zeros_like(shares)
            done = wanted - len(batch)
            for label, image in self._read(batch, done=done, total=wanted, what=what):
                if image is None:
                    short[label] += 1
                elif refuse and image_digest(image) in refuse:
                    short[label] += 1
                    refused += 1
                else:
                    taken.setdefault(label, []).append(image)
            left = self.available()
            shares = np.minimum(short, left)
            rest = int((short - shares).sum())
            shares = shares + balanced_shares(left - shares, rest, self.order)
        self._check(final=True)
        return self._image_set(taken, tuple(self.unreadable[before:])), refused

    def _read(
        self, batch: list[tuple[int, int]], *, done: int, total: int, what: str
    ) -> list[tuple[int, Pixels | None]]:
        results: list[tuple[int, Pixels | None]] = []
        with ThreadPoolExecutor(_THREADS) as pool:  # Pillow decodes outside the interpreter's lock
            for start in range(0, len(batch), _CHUNK):
                chunk = batch[start : start + _CHUNK]
                for (label, index), image in zip(
                    chunk, pool.map(self._try, (i for _, i in chunk)), strict=True
                ):
                    self.tried += 1
                    if isinstance(image, UnreadableError):
                        self.unreadable.append(f"{self.source.describe(index)}: {image}")
                        results.append((label, None))
                    else:
                        results.append((label, image))
                self._check(final=False)
                if self.progress is not None:
                    self.progress(done + start + len(chunk), total, what)
        return results

    def _try(self, index: int) -> Pixels | UnreadableError:
        try:
            return self.source.read(index)
        except UnreadableError as err:
            return err

    def _check(self, *, final: bool) -> None:
        """One bad image is forgiven in any set; after that, one in a hundred."""
        bad = len(self.unreadable)
        allowed = max(1, self.tried // 100) if final else max(20, self.tried // 50)
        if bad > allowed:
            names = "\n    ".join(self.unreadable[:10])
            more = f"\n    and {bad - 10} more" if bad > 10 else ""
            raise UsageError(
                f"{bad} of {self.tried} images read from {self.source.name} are unreadable "
                f"({bad / self.tried:.1%}; up to 1 % are left out):\n    {names}{more}",
                fix="remove or replace these files",
            )

    def _image_set(self, taken: dict[int, list[Pixels]], unreadable: tuple[str, ...]) -> ImageSet:
        rank = {label: position for position, label in enumerate(self.order)}
        keys = sorted(
            ((n, rank[label], label) for label, images in taken.items() for n in range(len(images)))
        )
        channels, height, width = self.model.preprocessing.input_size
        images = np.empty((len(keys), height, width, channels), dtype=np.uint8)
        for position, (n, _, label) in enumerate(keys):
            images[position] = taken[label][n]
        labels = np.array([label for _, _, label in keys], dtype=np.int64)
        mapping = self.source.mapping
        spec = DataSpec(
            source=self.source.name,
            sha256=digest(images, labels),
            count=len(keys),
            classes=len(taken),
            mapping=mapping.words,
            class_indices=mapping.indices,
            unreadable=unreadable,
        )
        return ImageSet(images=images, labels=labels, spec=spec)
