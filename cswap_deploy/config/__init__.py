"""Everything a build can be told: one model, with a section for each stage.

A setting is declared here once. Its field gives the type, the bounds and the default; the
:class:`Flag` beside the type gives the help text. The flag of the command, the name in a TOML file
and the stage's key in the store are made from the field; a new setting is one field and its use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cswap_deploy.config.prune import AIMS, METHODS, PruneConfig, RatioOf
from cswap_deploy.errors import UsageError
from cswap_deploy.settings import (
    BatchRange,
    Flag,
    Memory,
    Section,
    check_path,
    read_toml,
    shown,
)

__all__ = [
    "AIMS", "CONFIG_VARIABLE", "DROP_LIMITS", "METHODS", "OPSETS", "BuilderOptions", "Config",
    "DataConfig", "EngineConfig", "ExportConfig", "MeasureConfig", "ModelConfig", "Precision",
    "PruneConfig", "RatioOf", "RunConfig", "Task", "flat", "load_config", "sections",
]  # fmt: skip

CONFIG_VARIABLE = "CSWAP_CONFIG"
"""Names a TOML file of defaults; a file given with ``--config`` and flags win over it."""

Task = Literal["classify", "binary", "features", "dense", "detect", "any"]
"""What a network's outputs are. ``classify``: (N, classes), of which one is right. ``binary``:
(N, K) logits of independent yes or no. ``dense``: maps (N, classes, H, W). ``features``,
``detect``, ``any``: numbers that decide nothing by themselves."""
Precision = Literal["fp32", "fp16", "bf16", "int8", "mixed"]
OPSETS: dict[str, int] = {"fp32": 18, "fp16": 18, "int8": 18, "mixed": 21, "bf16": 22}
"""Lowest opset whose operators take the precision's types: Q/DQ with float16 scales come with 19,
convolutions in bfloat16 with 22."""
_LONGEST_NAME = 200
"""Letters of a model's name, of which the name of a folder is made."""
DROP_LIMITS: dict[str, float] = {
    "fp32": 0.0, "fp16": 0.001, "bf16": 0.005, "int8": 0.01, "mixed": 0.01,
}  # fmt: skip


class ModelConfig(Section):
    """Which network, and how its pictures are prepared."""

    title = "Network and images"

    model: Annotated[
        str, Flag("demo-resnet, demo-vit, a timm name, or package.module:factory.", local=True)
    ]
    checkpoint: Annotated[
        Path | None,
        Flag("Weights: safetensors, or torch.save.", metavar="FILE", common=True, local=True),
    ] = None
    checkpoint_key: Annotated[str | None, Flag("Which of its weights.", metavar="KEY")] = None
    """Where they lie in the file, as ``state_dict_ema``; see :mod:`models.checkpoints`."""
    pretrained: Annotated[bool, Flag("timm's own weights, or random ones.")] = True
    input_size: Annotated[
        tuple[int, int, int] | None, Flag("What the network takes.", metavar="C,H,W")
    ] = None
    mean: Annotated[tuple[float, ...] | None, Flag("Mean, pixels in [0, 1].", metavar="R,G,B")] = (
        None
    )
    std: Annotated[tuple[float, ...] | None, Flag("Their deviation.", metavar="R,G,B")] = None
    exif_rotate: Annotated[bool, Flag("Obey EXIF orientation.")] = False
    task: Annotated[
        Task | Literal["auto"],
        Flag("classify, binary, features, dense, detect, any.", metavar="TASK"),
    ] = "auto"
    """``auto``: from what the network returns; see :func:`models.outputs.recognise`."""

    @field_validator("model")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if len(value) > _LONGEST_NAME:
            raise ValueError(f"is a name of {len(value)} letters; {_LONGEST_NAME} are the most")
        return value

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.checkpoint_key is not None and self.checkpoint is None:
            raise ValueError("checkpoint_key chooses among the weights of a checkpoint; pass one")
        return self


class DataConfig(Section):
    """Which images the network is pruned on, and which it is tested on."""

    title = "Network and images"

    data: Annotated[
        str | None,
        Flag(
            "Labelled images: a folder, an .npz, or hf:NAME[:SPLIT].", metavar="PATH", common=True,
            local=True,
        ),
    ] = None  # fmt: skip
    calibration_data: Annotated[
        str | None, Flag("Photos to prune on, without classes.", metavar="PATH", local=True)
    ] = None
    """A folder, nested in any way, or an ``.npz``. Alone it is also tested on, by agreement with
    the dense network."""
    validation_data: Annotated[
        str | None, Flag("Test images alone.", metavar="PATH", local=True)
    ] = None
    class_map: Annotated[
        Path | None, Flag("Class index of a name.", metavar="FILE", local=True)
    ] = None
    """A JSON object, or the names in the order of the classes: a JSON list, a text of lines."""
    calibration_samples: Annotated[int, Field(ge=1), Flag("To prune on.")] = 1024
    """To measure effects on (``scoring_samples`` of them in each round), to refit layers on, and
    to compare candidates on."""
    validation_samples: Annotated[int, Field(ge=1), Flag("To test on.")] = 2000
    allow_overlap: Annotated[bool, Flag("Both may share images.")] = False
    allow_chance: Annotated[bool, Flag("Go on at chance level.")] = False
    """Build although the dense network is no better than guessing (``measure.chance``)."""

    @field_validator("data", "calibration_data", "validation_data")
    @classmethod
    def _is_path(cls, value: str | None) -> str | None:
        check_path(value or "")
        return value


class ExportConfig(Section):
    """The ONNX graph and its number formats."""

    title = "Graph and number formats"

    precision: Annotated[Precision, Flag("Number formats of the engine.", common=True)] = "fp32"
    """Types of graph and engine; ``int8`` leaves in float32 what is not quantised, ``mixed`` in
    float16."""
    precision_drop: Annotated[
        float | None, Field(ge=0, le=0.2), Flag("Top-1 it may cost, or exit 3 (int8 .01).")
    ] = None
    """A fraction, against the pruned float32 network; one image is always allowed. No more than
    .2, so that percents typed by mistake are refused."""
    keep_fp32: Annotated[
        tuple[str, ...], Flag("Stays float32, as '*/Softmax'; repeat.", metavar="MODULE")
    ] = ()
    int8_calibration: Annotated[
        Literal["auto", "entropy", "percentile", "minmax"],
        Flag("How int8 ranges are found."),
    ] = "auto"
    int8_quantizer: Annotated[
        Literal["onnxruntime", "modelopt"],
        Flag("The quantiser that places Q/DQ pairs."),
    ] = "onnxruntime"
    """``modelopt``: NVIDIA's, from the environment that ``CSWAP_MODELOPT`` names."""
    opset: Annotated[int | Literal["auto"], Flag("ONNX opset; auto is the lowest that does.")] = (
        "auto"
    )
    parity_tolerance: Annotated[
        float, Field(gt=0, le=1e6), Flag("Allowed difference of logits.")
    ] = 1e-3
    child_seconds: Annotated[
        float, Field(gt=0, le=86400), Flag("Of a process of its own.", expert=True, in_key=False)
    ] = 600.0
    """Native code may crash or hang on a graph, so it is simplified, and tried in ONNX Runtime and
    OpenVINO, in such a process. After that time, or beyond the memory, it goes on as exported."""
    child_memory: Annotated[
        Memory | None, Field(ge=1), Flag("As seconds: of memory.", expert=True, in_key=False)
    ] = None
    """As much as this machine has, unless said."""
    with_dense: Annotated[bool, Flag("Keep the dense graph too, for `check`.", in_key=False)] = (
        False
    )

    @field_validator("opset")
    @classmethod
    def _known_opset(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 18:
            raise ValueError(
                "must be 18 or higher, or auto\n"
                "    torch's exporter writes opset 18 and for some networks leaves it at that "
                "without a word when a lower one is asked for\n"
                "  fix: leave --opset out; a runtime that reads no opset 18 needs a later version"
            )
        return value

    @model_validator(mode="after")
    def _fits_precision(self) -> Self:
        if isinstance(self.opset, int) and self.opset < OPSETS[self.precision]:
            raise ValueError(
                f"{self.precision} needs opset {OPSETS[self.precision]} or higher, got "
                f"{self.opset}: the operators of lower ones do not take its types\n"
                f"  fix: leave --opset out, or pass {OPSETS[self.precision]}"
            )
        needless: tuple[str, ...] = () if self.int8 else ("int8_calibration", "int8_quantizer")
        needless += ("keep_fp32", "precision_drop") if self.precision == "fp32" else ()
        fields = type(self).model_fields
        given = [name for name in needless if getattr(self, name) != fields[name].default]
        if given:  # most likely --precision was forgotten
            raise ValueError(f"{', '.join(given)}: does nothing with precision {self.precision}")
        if self.int8_quantizer == "modelopt" and self.int8_calibration == "percentile":
            raise ValueError("modelopt has no int8_calibration percentile: entropy, minmax or auto")
        return self

    @property
    def int8(self) -> bool:
        """Whether layers are to compute in int8."""
        return self.precision in ("int8", "mixed")

    @property
    def graph_opset(self) -> int:
        """Opset of the exported graph."""
        return OPSETS[self.precision] if self.opset == "auto" else self.opset

    @property
    def drop_limit(self) -> float:
        """Largest loss of top-1 that the precision may cost (fraction)."""
        given = self.precision_drop
        return DROP_LIMITS[self.precision] if given is None else given

    def export_key(self) -> dict[str, Any]:
        """What shapes the float32 graphs; the rest comes after them."""
        return {
            "opset": self.graph_opset, "parity_tolerance": self.parity_tolerance,
            "child": [self.child_seconds, self.child_memory],  # more of it: another try
        }  # fmt: skip

    def precision_key(self) -> dict[str, Any]:
        """What shapes the narrowed graph."""
        own = self.key()
        return {n: v for n, v in own.items() if n not in ("opset", "parity_tolerance")} | {
            "precision_drop": self.drop_limit
        }


class BuilderOptions(Section):
    """What TensorRT's builders can be told; ``targets.tensorrt_flavours`` says which package has
    what."""

    title = "Engines"

    workspace_mib: Annotated[
        int | None, Field(ge=1), Flag("TensorRT: scratch memory of the builder.", metavar="MIB")
    ] = None
    optimization_level: Annotated[
        int | None,
        Field(ge=0, le=5),
        Flag("TensorRT: effort of the builder (3).", metavar="0..5", expert=True),
    ] = None
    hardware_compat: Annotated[
        Literal["none", "ampere+", "same-cc"], Flag("TensorRT: other GPUs that may run it.")
    ] = "none"
    version_compatible: Annotated[bool, Flag("TensorRT: later versions too.")] = False
    compute_capability: Annotated[
        tuple[str, ...], Flag("TensorRT-RTX: its GPUs; repeat.", metavar="X.Y")
    ] = ()
    strip_weights: Annotated[bool, Flag("TensorRT: the weights stay in model.onnx.")] = False
    refit_engine: Annotated[bool, Flag("TensorRT: the engine's weights may be replaced.")] = False


class EngineConfig(BuilderOptions):
    """The runtimes that engines are built for."""

    target: Annotated[
        tuple[str, ...],
        Flag(
            "onnxruntime, openvino, tensorrt-rtx, tensorrt, onnxruntime-cuda; repeat.",
            metavar="NAME", common=True,
        ),
    ] = ("onnxruntime",)  # fmt: skip
    batch: Annotated[BatchRange, Flag("Of the engine.", metavar="MIN:OPT:MAX")] = BatchRange()

    @field_validator("target")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _for_a_builder(self) -> Self:
        told = self.options.model_dump(exclude_defaults=True)
        if told and not any(target.startswith("tensorrt") for target in self.target):
            raise ValueError(
                f"{', '.join(sorted(told))}: for the tensorrt targets, not {', '.join(self.target)}"
            )
        return self

    @property
    def options(self) -> BuilderOptions:
        """What is for the TensorRT builders alone."""
        return BuilderOptions(**{name: getattr(self, name) for name in BuilderOptions.model_fields})


class MeasureConfig(Section):
    """How engines are timed, and what they are held against."""

    title = "Checks"

    latency_batch: Annotated[
        int | None, Field(ge=1), Flag("Batch that is timed (OPT of --batch).", metavar="N")
    ] = None
    latency_runs: Annotated[int, Field(ge=10, le=10**6), Flag("Timed calls.")] = 400
    """An interval of the 99th percentile takes 368."""
    threads: Annotated[
        int | None, Field(ge=1, le=4096), Flag("Of a CPU runtime (all cores).", "N")
    ] = None
    no_images: Annotated[bool, Flag("No photos in the report.", in_key=False)] = False
    """Else up to twelve validation images whose prediction changed, as thumbnails."""
    metric: Annotated[
        str | None,
        Flag("Own: MODULE:FUNCTION(outputs, labels).", "NAME", in_key=False, local=True),
    ] = None
    budget: Annotated[
        Path | None,
        Flag("Fail (exit 3) if a limit is exceeded.", "FILE.toml", in_key=False, local=True),
    ] = None


class RunConfig(Section):
    """Where results go, and what is reused."""

    title = "Running"

    output: Annotated[
        Path | None,
        Flag("Folder to leave the result in.", "DIR", short="-o", common=True, local=True),
    ] = None
    store: Annotated[Path | None, Flag("Where finished stages are kept.", "DIR", local=True)] = None
    resume: Annotated[bool, Flag("Reuse finished stages, or not.", off="--fresh")] = True
    seed: Annotated[int, Field(ge=0), Flag("Of every random choice.")] = 0


class Config(BaseModel):
    """The settings of a build, one section a stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    prune: PruneConfig = Field(default_factory=PruneConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    measure: MeasureConfig = Field(default_factory=MeasureConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        batch = self.engine.batch
        if not batch.min <= self.timed_batch <= batch.max:
            raise ValueError(
                f"latency_batch {self.timed_batch} is outside the profile --batch {batch}"
            )
        others = [t for t in self.engine.target if not t.startswith("tensorrt")]
        if self.export.precision == "bf16" and others:
            raise ValueError("bf16 runs on the tensorrt targets alone; add --target tensorrt-rtx")
        return self

    @property
    def timed_batch(self) -> int:
        """Samples in a timed call."""
        given = self.measure.latency_batch
        return self.engine.batch.opt if given is None else given

    def settings(self) -> dict[str, Any]:
        """Every setting by name, as plain data."""
        return flat(self.model_dump(mode="json"))

    def bundle_path(self) -> Path:
        """Where the bundle goes."""
        return self.folder(self.prune.label)

    def folder(self, label: str) -> Path:
        """Where something made of the model goes: as asked, or the model's name and a label."""
        if self.run.output is not None:
            return self.run.output
        name = self.model.model.replace(":", "-").replace("/", "-")
        return Path(f"{name}-{label}")


def sections() -> dict[str, type[Section]]:
    """Section name -> its type, in the order of the stages."""
    return {name: cast("type[Section]", f.annotation) for name, f in Config.model_fields.items()}


def load_config(file: Path | None = None, **settings: Any) -> Config:
    """Merge TOML files and explicit settings.

    Args:
        file: Settings by name (``ratio = 0.3``), or in a table of their section
            (``[prune]``); wins over the file that ``CSWAP_CONFIG`` names.
        **settings: By name; they win over both. ``None`` counts as not given.

    Raises:
        UsageError: The file cannot be read, a name is unknown, or a value is out of range.
    """
    merged: dict[str, Any] = {}
    for path in (os.environ.get(CONFIG_VARIABLE), file):
        if path:
            merged = _over(merged, flat(read_toml(Path(path))))
    merged = _over(merged, {name: value for name, value in settings.items() if value is not None})
    homes = {name: section for section, kind in sections().items() for name in kind.model_fields}
    nested: dict[str, Any] = {section: {} for section in sections()}
    for name, value in merged.items():
        if name in homes:
            nested[homes[name]][name] = value
        else:
            nested[name] = value  # the model refuses it, among whatever else is wrong
    try:
        return Config.model_validate(nested)
    except ValidationError as err:
        where = f" in {file} and the flags" if file is not None else ""
        lines = dict.fromkeys(_problem(problem) for problem in err.errors())
        raise UsageError(f"bad settings{where}:\n  " + "\n  ".join(lines)) from err


def _over(under: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings under those that win; an aim replaces another one, whatever it is called."""
    replaced: set[str] = set(AIMS) if given.keys() & set(AIMS) else set()
    if given.keys() & {"speedup", "max_latency"}:
        replaced.add("ratio_of")
    return {name: value for name, value in under.items() if name not in replaced} | given


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of section tables, and those beside them, by name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in sections() and isinstance(value, dict):
            found |= {inner.replace("-", "_"): v for inner, v in value.items()}
        else:
            found[name.replace("-", "_")] = value
    return found


def _problem(problem: Any) -> str:
    """One of pydantic's errors, with the flag and the value."""
    place = [part for part in problem["loc"][:2] if isinstance(part, str)]
    if not place or (len(place) == 1 and place[0] in sections()):
        return str(problem["msg"])
    first, *more = problem["msg"].splitlines()  # why, and the fix, follow
    text = f"--{place[-1].replace('_', '-')}: {first}"
    if problem["type"] not in ("missing", "extra_forbidden"):
        text += f" (got {shown(problem['input'], repr)})"
    return "\n".join([text, *more])
