"""Everything a build can be told, in one typed model for flags, TOML files and Python callers."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cswap_deploy.errors import UsageError
from cswap_deploy.records.engine import BatchRange, EngineOptions
from cswap_deploy.records.plan import RatioOf

CONFIG_VARIABLE = "CSWAP_CONFIG"
"""Names a TOML file of defaults; a file given with ``--config`` and flags win over it."""


METHODS: dict[str, dict[str, Any]] = {
    "cswap": {
        "intervention": "predicted", "effect": "kl", "mix": True, "select": "set", "refit": True,
        "refit_producers": True,
    },
    "paper": {
        "intervention": "zero", "effect": "true-class", "mix": False, "select": "unit",
        "refit": False, "refit_producers": False, "rounds": 16,
    },
}  # fmt: skip
"""What ``--method`` stands for; each choice can be given by itself, and wins. ``paper`` is the
method as published (arXiv:2510.18636), ``cswap`` the best that was measured
(benchmarks/LOG.md)."""


Precision = Literal["fp32", "fp16", "bf16", "int8", "mixed"]
OPSETS: dict[str, int] = {"fp32": 18, "fp16": 18, "int8": 18, "mixed": 21, "bf16": 22}
"""Lowest opset whose operators take the precision's types: Q/DQ with float16 scales come with 19,
convolutions in bfloat16 with 22."""
INT8_SETTINGS = ("int8_calibration", "int8_quantizer")
PRECISION_SETTINGS = (*INT8_SETTINGS, "keep_fp32", "precision_drop")
"""That belong to a precision."""
DROP_LIMITS: dict[str, float] = {
    "fp32": 0.0, "fp16": 0.001, "bf16": 0.005, "int8": 0.01, "mixed": 0.01,
}  # fmt: skip


class BuildConfig(EngineOptions):
    """The settings of a build; every flag of ``cswap-deploy build`` is a field of the same name.

    The options of the TensorRT builders are among them; see ``records.engine.EngineOptions``.
    """

    # model
    model: str
    checkpoint: Path | None = None
    pretrained: bool = True
    input_size: tuple[int, int, int] | None = None
    """(C, H, W)."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    # data
    data: str | None = None
    validation_data: str | None = None
    class_map: Path | None = None
    """JSON object: folder or label name -> class index of the model."""
    calibration_samples: int = Field(default=1024, ge=1)
    """Images to measure on (``scoring_samples`` of them in each round), to solve layers on, and to
    judge sets of units on."""
    validation_samples: int = Field(default=2000, ge=1)
    allow_overlap: bool = False
    """Let an image be in both sets; the report says so."""

    # pruning
    ratio: float = Field(default=0.4, ge=0.0, lt=1.0)
    ratio_of: RatioOf = "params"
    round_to: int | Literal["auto"] = "auto"
    criterion: str = "cswap"
    scoring_samples: int | Literal["auto"] = "auto"
    """Images on which each unit's effect is known in each round; auto: 256, fewer where measuring
    is ``exact`` and would cost more than ``causal.cost.BUDGET_MACS``."""
    measuring: Literal["auto", "exact", "bf16", "adaptive"] = "auto"
    """``exact``: every unit on every one of these images. ``adaptive``: until its side of the cut
    is certain (:mod:`causal.adaptive`). ``bf16``: every unit on every image in bfloat16, then in
    float32 where that leaves its side of the cut open. auto: exact unless it costs more than
    ``causal.cost.BUDGET_MACS``, else adaptive within that."""
    error_rate: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Of ``adaptive``: probability of the wrong side at which a unit's measuring ends."""
    memory_budget: int | None = Field(default=None, ge=1)
    """Bytes that measuring may use beside network and images; a third of what is free unless said.
    In text ``512MiB``, ``2GiB``. Changes no result."""
    rounds: int = Field(default=4, ge=1)
    """Steps in which the ratio is reached; effects are measured again in each."""
    method: Literal["cswap", "paper"] = "cswap"
    """Fills in what follows where it is not given; see ``METHODS``."""
    effect: Literal["kl", "true-class"] = "kl"
    """What ranks the units; both are measured, verdicts come from ``true-class``."""
    mix: bool = True
    """Measure on every second image lightly mixed with another: a network knows its training images
    by heart, and few units seem to matter there."""
    intervention: Literal["zero", "mean", "predicted"] = "predicted"
    """What a unit is set to while its effect is measured, and when it goes."""
    select: Literal["set", "unit"] = "set"
    """``unit``: what goes is what has the least effect by itself. ``set``: several orders propose
    what goes, and the set with the least effect as a whole is taken."""
    scoring_device: Literal["cpu", "cuda"] = "cpu"
    """Where effects are measured."""
    workers: str | None = None
    """Who measures effects: so many processes (``4``), or a Ray cluster (``ray://HOST:PORT``); this
    process unless said. Changes no result."""
    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)
    """False-discovery rate of the verdicts."""
    min_effect: float = Field(default=0.01, ge=0.0)
    """Smallest |effect| on a class that counts as a verdict, as a fraction of the probability."""
    refit: bool = True
    """Solve every layer behind a removed unit again, in closed form."""
    refit_producers: bool = True
    """With ``refit``: in the last round also let the units that stay take over what others carried,
    each solved again in closed form."""

    # export, targets
    target: tuple[str, ...] = ("onnxruntime",)
    precision: Precision = "fp32"
    """Number formats of graph and engine: ``int8`` leaves in float32 what is not quantised,
    ``mixed`` in float16."""
    precision_drop: float | None = Field(default=None, ge=0.0, le=0.2)
    """Largest loss of top-1 that the precision may cost, against the pruned float32 network; .001
    for fp16, .005 for bf16, .01 with int8 unless said. One image is always allowed. No more than
    .2, so that percents typed by mistake are refused."""
    keep_fp32: tuple[str, ...] = ()
    """What keeps its type: modules (``blocks.0.attn``), or patterns of nodes (``*/Softmax``)."""
    int8_calibration: Literal["auto", "entropy", "percentile", "minmax"] = "auto"
    """How the range of an activation is found; auto: the best of the three by measured effect."""
    int8_quantizer: Literal["onnxruntime", "modelopt"] = "onnxruntime"
    """Who places Q/DQ pairs. ``modelopt``: NVIDIA's, from the environment of CSWAP_MODELOPT."""
    opset: int | Literal["auto"] = "auto"
    """Of ONNX; auto: the lowest that has the operators in this precision, 18, 21 or 22."""
    batch: BatchRange = BatchRange()
    """Smallest, tuned-for and largest batch of an engine."""
    latency_batch: int | None = Field(default=None, ge=1)
    """Timed; the batch that the engine is tuned for unless said."""
    latency_runs: int = Field(default=200, ge=10)
    threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU runtime; the machine's cores unless said."""
    parity_tolerance: float = Field(default=1e-3, gt=0.0)
    """Largest |difference of logits| that export and engine may show."""
    budget: Path | None = None

    # running
    output: Path | None = None
    """The bundle; ``<model>-<ratio>`` in the working directory unless said."""
    store: Path | None = None
    """Where finished stages are kept; the user's cache directory unless said."""
    resume: bool = True
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _method(cls, given: Any) -> Any:
        if isinstance(given, dict):
            preset = METHODS.get(str(given.get("method", "cswap")), {})
            return preset | {name: v for name, v in given.items() if v is not None}
        return given

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from cswap_deploy.causal.memory import parse_size

        try:
            return parse_size(value)
        except UsageError as err:
            raise ValueError(str(err)) from err

    @field_validator("workers", mode="before")
    @classmethod
    def _where(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int) else value
        if isinstance(text, str) and not re.fullmatch(r"[1-9]\d*|ray://\S+:\d+", text):
            raise ValueError("must be a number above zero, or ray://HOST:PORT")
        return text

    @field_validator("target")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("opset")
    @classmethod
    def _known_opset(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 18:
            raise ValueError("must be 18 or higher, or auto")
        return value

    @field_validator("round_to", "scoring_samples")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 1 or more, or auto")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [self.mean is not None, self.std is not None]
        if any(given) and not all(given):
            raise ValueError("mean and std go together")
        if self.workers is not None and self.scoring_device != "cpu":
            raise ValueError("workers measure on CPUs; scoring_device cuda is for this process")
        if not self.batch.min <= self.timed_batch <= self.batch.max:
            raise ValueError(
                f"latency_batch {self.timed_batch} is outside the profile --batch {self.batch}"
            )
        if isinstance(self.opset, int) and self.opset < OPSETS[self.precision]:
            raise ValueError(
                f"{self.precision} needs opset {OPSETS[self.precision]} or higher, got {self.opset}"
            )
        unused = self._unused_precision_settings()
        if unused:
            raise ValueError(f"{', '.join(unused)}: does nothing with precision {self.precision}")
        if self.int8_quantizer == "modelopt" and self.int8_calibration == "percentile":
            raise ValueError("modelopt has no int8_calibration percentile: entropy, minmax or auto")
        builders = [target for target in self.target if target.startswith("tensorrt")]
        options = ", ".join(self.engine_options.model_dump(exclude_defaults=True))
        if options and not builders:
            raise ValueError(f"{options}: for the tensorrt targets, not {', '.join(self.target)}")
        if self.precision == "bf16" and set(self.target) - set(builders):
            raise ValueError("bf16 runs on the tensorrt targets alone; add --target tensorrt-rtx")
        return self

    def _unused_precision_settings(self) -> list[str]:
        """Given, and of no use: most likely ``precision`` was forgotten."""
        names: tuple[str, ...] = () if self.int8 else INT8_SETTINGS
        names += ("keep_fp32", "precision_drop") if self.precision == "fp32" else ()
        defaults = type(self).model_fields
        return [name for name in names if getattr(self, name) != defaults[name].default]

    @property
    def int8(self) -> bool:
        """Whether layers are to compute in int8."""
        return self.precision in ("int8", "mixed")

    @property
    def engine_options(self) -> EngineOptions:
        """What is for the TensorRT builders alone."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.model_fields})

    @property
    def timed_batch(self) -> int:
        """Samples in a timed call."""
        return self.batch.opt if self.latency_batch is None else self.latency_batch

    @property
    def graph_opset(self) -> int:
        """Opset of the exported graph."""
        return OPSETS[self.precision] if self.opset == "auto" else self.opset

    @property
    def drop_limit(self) -> float:
        """What ``precision_drop`` comes to."""
        given = self.precision_drop
        return DROP_LIMITS[self.precision] if given is None else given

    def bundle_path(self) -> Path:
        """Where the bundle goes."""
        if self.output is not None:
            return self.output
        return Path(f"{self.model.replace(':', '-').replace('/', '-')}-{self.ratio:g}")


def load_config(file: Path | None = None, **settings: Any) -> BuildConfig:
    """Merge TOML files and explicit settings; settings that are ``None`` count as not given.

    Raises:
        UsageError: The file cannot be read, a name is unknown, or a value is out of range.
    """
    merged: dict[str, Any] = {}
    for path in (os.environ.get(CONFIG_VARIABLE), file):
        if path:
            merged |= _read_toml(Path(path))
    merged |= {name: value for name, value in settings.items() if value is not None}
    try:
        return BuildConfig.model_validate(merged)
    except ValidationError as err:
        lines = []
        for problem in err.errors():
            name = ".".join(str(part) for part in problem["loc"][:1]).replace("_", "-")
            got = (
                ""
                if problem["type"] in ("missing", "extra_forbidden")
                else (f" (got {problem['input']!r})" if problem["loc"] else "")
            )
            lines.append(f"--{name}: {problem['msg']}{got}" if name else problem["msg"])
        where = f" in {file} and the flags" if file is not None else ""
        raise UsageError(f"bad settings{where}:\n  " + "\n  ".join(dict.fromkeys(lines))) from err


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        read = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read the configuration {file}: {err}") from err
    return {name.replace("-", "_"): value for name, value in read.items()}
