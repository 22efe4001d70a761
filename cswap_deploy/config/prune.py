"""Settings of the prune stage."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cswap_deploy.settings import Flag, Memory, Section

RatioOf = Literal["params", "channels", "macs", "latency"]
AIMS = "ratio", "speedup", "max_latency"
"""Settings that say how far to go."""
METHODS: dict[str, dict[str, Any]] = {
    "cswap": {
        "intervention": "predicted", "effect": "kl", "mix": True, "select": "set", "refit": True,
        "refit_producers": True, "branches": True,
    },
    "paper": {
        "intervention": "zero", "effect": "true-class", "mix": False, "select": "unit",
        "refit": False, "refit_producers": False, "rounds": 16,
        "branches": False,
    },
}  # fmt: skip
"""What ``--method`` stands for; a setting of its own wins. ``paper`` is the method as published
(arXiv:2510.18636), ``cswap`` the best that was measured (benchmarks/LOG.md)."""


class PruneConfig(Section):
    """How units are measured, chosen and removed, and how the rest makes up for them."""

    title = "Pruning"

    ratio: Annotated[float, Field(ge=0, lt=1), Flag("Fraction to remove.", common=True)] = 0.4
    ratio_of: Annotated[RatioOf, Flag("Fraction of what.")] = "params"
    speedup: Annotated[
        float | None,
        Field(gt=1, le=1e6),
        Flag("Instead: times as fast, on the target.", common=True),
    ] = None
    """Instead of a ratio, as the next: what the timed batch and threads of the build say."""
    max_latency: Annotated[
        float | None, Field(gt=0, le=1e9), Flag("At most, on the target.", metavar="4ms")
    ] = None
    """Milliseconds."""
    latency_table: Annotated[Path | None, Flag("Of another device.", "FILE", in_key=False)] = None
    """What ``cswap-run --profile`` wrote there: speed is then aimed at on that device."""
    method: Annotated[
        Literal["cswap", "paper"], Flag("The best measured, or as published.", in_key=False)
    ] = "cswap"
    """Fills in what is not given; see :data:`METHODS`."""
    criterion: Annotated[str, Flag("Importance: cswap, magnitude, lamp, random.")] = "cswap"
    rounds: Annotated[int, Field(ge=1, le=10_000), Flag("Measure and remove.")] = 3
    waypoints: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Flag("Ratios that are results on one way.", expert=True),
    ] = ()
    """Ascending, with ``ratio`` among them: what ``cswap-deploy sweep`` sets. A round ends at each,
    and what it leaves is where the next one begins."""
    exclude: Annotated[
        tuple[str, ...], Flag("Layers whose outputs stay, as 'layer4.*'; repeat.", metavar="GLOB")
    ] = ()
    include: Annotated[
        tuple[str, ...], Flag("Only these may lose outputs; repeat.", metavar="GLOB")
    ] = ()
    round_to: Annotated[int | Literal["auto"], Flag("Multiple to which widths are kept.")] = "auto"
    effect: Annotated[Literal["kl", "true-class"], Flag("What ranks the units.")] = "kl"
    intervention: Annotated[
        Literal["predicted", "mean", "zero"], Flag("What a unit is set to.", expert=True)
    ] = "predicted"
    measuring: Annotated[
        Literal["auto", "exact", "bf16", "adaptive"],
        Flag("How thoroughly."),
    ] = "auto"
    """``exact``: every unit on every image. ``adaptive``: until its side of the threshold is
    certain (:mod:`causal.adaptive`). ``bf16``: every unit on every image in bfloat16, then in
    float32 where that leaves its side open. ``auto``: exact where that takes seconds or a few
    passes over the images, else adaptive within a budget (:func:`causal.cost.budgets`)."""
    scoring_samples: Annotated[int | Literal["auto"], Flag("Images for measuring.")] = "auto"
    """In each round, others each time. ``auto``: up to 256, fewer where exact costs too much."""
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), Flag("Where.", "cpu|cuda:N", in_key=False)
    ] = "auto"
    workers: Annotated[
        str | None, Flag("Worker processes, or ray://HOST:PORT.", metavar="N|URL", in_key=False)
    ] = None
    memory_budget: Annotated[
        Memory | None, Field(ge=1), Flag("2GiB; a third of free.", "SIZE", in_key=False)
    ] = None
    refit: Annotated[bool, Flag("Refit what is left.")] = True
    recover: Annotated[
        float | None, Field(gt=0, le=1440), Flag("Minutes of training.", "MIN", in_key=False)
    ] = None
    """After pruning, towards the dense network, without labels: :mod:`pruning.recover`."""
    branches: Annotated[bool, Flag("Residual ones may go.")] = True
    refit_producers: Annotated[
        bool, Flag("In the last round also reconstruct producers.", expert=True)
    ] = True
    select: Annotated[
        Literal["set", "unit"], Flag("Compare candidates as a whole, or single units.", expert=True)
    ] = "set"
    """``unit``: what has the least effect by itself goes. ``set``: several rankings and
    allocations propose candidates, and the one with the least effect as a whole goes."""
    mix: Annotated[bool, Flag("Measure on lightly mixed images too.", expert=True)] = True
    """Every second image is lightly mixed with another: a network knows its training images by
    heart, and few units seem to matter there."""
    error_rate: Annotated[
        float, Field(gt=0, lt=1), Flag("Of wrong sides in adaptive measuring.", expert=True)
    ] = 0.05
    alpha: Annotated[
        float, Field(gt=0, lt=1), Flag("False-discovery rate of the verdicts.", expert=True)
    ] = 0.05
    min_effect: Annotated[
        float, Field(ge=0, le=1e6), Flag("Smallest effect that counts for a verdict.", expert=True)
    ] = 0.01

    @model_validator(mode="before")
    @classmethod
    def _method(cls, given: Any) -> Any:
        if isinstance(given, dict):
            preset = METHODS.get(str(given.get("method", "cswap")), {})
            return preset | {name: v for name, v in given.items() if v is not None}
        return given

    @model_validator(mode="before")
    @classmethod
    def _aim(cls, given: Any) -> Any:
        """A speed-up or a latency is a ratio of latency; the latter's is known once it is timed."""
        if not isinstance(given, dict):
            return given
        aims = [name for name in ("speedup", "max_latency") if given.get(name) is not None]
        if not aims:
            return given
        ratio, of = given.get("ratio"), given.get("ratio_of", "latency")
        asked = _number(given.get("speedup"))
        meant = 1 - 1 / asked if asked > 1 else None
        same = ratio is None or (meant is not None and abs(_number(ratio) - meant) < 1e-9)
        if len(aims) > 1 or of != "latency" or not (same or "max_latency" in aims):
            raise ValueError(
                "speedup, max_latency and ratio are one aim: pass one of them; a ratio of other "
                f"things than latency is no {aims[0]}"
            )
        return given | {"ratio_of": "latency"} | ({} if meant is None else {"ratio": meant})

    @model_validator(mode="after")
    def _table_is_used(self) -> Self:
        if self.latency_table is not None and self.ratio_of != "latency":
            raise ValueError("latency_table does nothing without speedup or max_latency")
        return self

    @field_validator("max_latency", mode="before")
    @classmethod
    def _milliseconds(cls, value: Any) -> Any:
        return value.strip().removesuffix("ms") if isinstance(value, str) else value

    @field_validator("workers", mode="before")
    @classmethod
    def _where(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int) else value
        if isinstance(text, str) and not re.fullmatch(r"[1-9]\d{0,3}|ray://\S+:\d+", text):
            raise ValueError("must be a number above zero, or ray://HOST:PORT")
        return text

    @field_validator("round_to", "scoring_samples")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 1 or more, or auto")
        return value

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        path = list(self.waypoints)
        if path and (path != sorted(set(path)) or self.ratio not in path):
            raise ValueError(f"waypoints ascend, and the ratio {self.ratio:g} is one: {path}")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.workers is not None and self.device.startswith("cuda"):
            raise ValueError(f"workers measure on CPUs; device {self.device} is for this process")
        return self

    @property
    def aim(self) -> str:
        """What is asked, in words."""
        if self.speedup is not None:
            return f"{self.speedup:g}x as fast"
        if self.max_latency is not None:
            return f"at most {self.max_latency:g} ms"
        return f"{self.ratio:.0%} of {self.ratio_of}"

    @property
    def label(self) -> str:
        """The same in a folder's name."""
        if self.speedup is not None:
            return f"{self.speedup:g}x"
        return f"{self.ratio:g}" if self.max_latency is None else f"{self.max_latency:g}ms"


def _number(value: Any) -> float:
    """A value that is not checked yet; not a number where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
