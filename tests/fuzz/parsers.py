"""The parsers: what is right for each, how it is spoilt, and who reads it."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fuzz.mutations import (
    Mutation,
    bytes_changed,
    json_changed,
    png_changed,
    sealed_json_changed,
    sized_header_changed,
    zip_changed,
)

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Parser:
    """One reader of files that others wrote. Whatever it raises is to be a ``CswapError``."""

    file: str
    """Name of the file; the reader is given its path."""
    seeds: Callable[[], list[bytes]]
    """Files that it reads."""
    mutate: Mutation
    reader: Callable[[], Read]


def _toml() -> list[bytes]:
    return [
        b'ratio = 0.3\nseed = 1\n[prune]\nrounds = 2\nexclude = ["a.*"]\nmemory_budget = "2GiB"\n',
        b'[model]\nmodel = "demo-vit"\nmean = [0.5]\nstd = [0.25]\ninput_size = [1, 28, 28]\n',
        b'[engine]\nbatch = "1:8:64"\ntarget = ["tensorrt-rtx"]\n[run]\noutput = "x"\n',
        b"speedup = 1.5\nparity_tolerance = 1e-3\nmin-effect = 0.01\nratio-of = 'latency'\n",
        b'[data]\ndata = "images.npz"\nclass_map = "c.json"\ncalibration_samples = 64\n',
    ]


_TOML_WORDS = (
    b"inf", b"nan", b"-1", b"1e400", b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 3000, b"{a=" * 2000,
    b"a." * 3000 + b"a = 1\n", b'"\\u0000"', b"[[prune]]\n", b"'", b'"""', b"1979-05-27T07:32:00Z",
    b'"' + b"x" * 300 + b'"', b"true", b"[]", b"{}", b"= ", b"\n[run]\n", b"\xff", b"0", b"1e-300",
)  # fmt: skip


def _read_toml() -> Read:
    from cswap_deploy.config import load_config

    return lambda path: load_config(path, model="demo-resnet")


def _budgets() -> list[bytes]:
    return [
        b"accuracy_drop_max = 0.02\ntop1_min = 0.9\nparams_max = 200_000\nmacs_max = 30\n",
        b"[latency.onnxruntime]\np50_ms = 5.0\nbatch = 1\n[engine.tensorrt-rtx]\n"
        b"size_max_mib = 5.0\n",
        b'inconclusive = "fail"\n[baseline]\nbundle = "git:main:x"\ntop1_drop_max = 0.005\n',
    ]


def _read_budgets() -> Read:
    from cswap_deploy.gate.budgets import read_budgets

    return read_budgets


def _class_map() -> list[bytes]:
    return [b'{"cat": 0, "dog": 1, "owl": 2}', b'["cat", "dog", "owl"]', b"cat\ndog\nowl/\n"]


def _spec() -> Any:
    from small_models import CLASSES, INPUT_SIZE, MEAN, STD

    from cswap_deploy.records.model import ModelSpec, Preprocessing

    pre = Preprocessing(input_size=INPUT_SIZE, mean=MEAN, std=STD, resize_shorter=18)
    return ModelSpec(
        name="small", source="factory", weights="random", weights_sha256="0" * 64,
        num_classes=CLASSES, preprocessing=pre,
    )  # fmt: skip


def _read_class_map() -> Read:
    from cswap_deploy.data.labels import read_class_map

    spec = _spec()
    return lambda path: read_class_map(path, spec)


def _npz() -> list[bytes]:
    import numpy as np
    from small_models import pictures

    images, labels = pictures(6)
    names = np.array(["cat", "dog", "owl", "cat", "dog", "owl"])
    found = []
    for save, arrays in (
        (np.savez, {"images": images, "labels": labels}),
        (np.savez_compressed, {"images": images[:, :12], "labels": labels[:, None]}),
        (np.savez, {"images": images[..., 0], "labels": names}),
    ):
        file = io.BytesIO()
        save(file, **arrays)
        found.append(file.getvalue())
    return found


_NPZ_WORDS = (
    b"'|O'", b"'<f8'", b"'|V0'", b"'<U3'", b"(1000000000000, 16, 16, 3)", b"(-1,)", b"()",
    b"(" * 90, b"True", b"None", b"\x93NUMPY\x03\x00", b"'M8[ns]'",
    b"[('a', '<u1')]", b"(0, 16, 16, 3)",
)  # fmt: skip


def _read_npz() -> Read:
    from cswap_deploy.data.labels import Classes
    from cswap_deploy.data.sources import open_npz

    classes = Classes(_spec(), {"cat": 0, "dog": 1, "owl": 2, **{str(n): n for n in range(5)}})
    plain = Classes(_spec())

    def read(path: Path) -> object:
        from cswap_deploy.errors import CswapError

        try:
            source = open_npz(path, plain)
        except CswapError:
            source = open_npz(path, classes)
        return [source.read(at) for at in range(min(len(source.labels), 8))]

    return read


def _state() -> dict[str, Any]:
    from small_models import SmallNet

    return SmallNet(4).state_dict()


def _safetensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    state = _state()
    half = {name: tensor.to(torch.float16) for name, tensor in state.items()}
    return [save(state), save(half), save({f"model.{name}": t for name, t in state.items()})]


def _torch_save() -> list[bytes]:
    import torch

    state = _state()
    found = []
    for obj, zipped in (
        (state, True),
        ({"state_dict": state, "epoch": 3, "args": {"lr": 0.1}}, True),
        ({"model": {"module": state}, "model_ema": state}, False),
    ):
        file = io.BytesIO()
        torch.save(obj, file, _use_new_zipfile_serialization=zipped)
        found.append(file.getvalue())
    return found


def _zip_or_bytes(rng: random.Random, data: bytes) -> bytes:
    return (zip_changed if data.startswith(b"PK") else bytes_changed)(rng, data)


def _read_checkpoint() -> Read:
    from small_models import SmallNet

    from cswap_deploy.models.checkpoints import choose_weights, load_into, read_checkpoint

    module = SmallNet(4)

    def read(path: Path) -> object:
        weights = choose_weights(path, module.state_dict())
        load_into(module, weights, name="small", input_size=(3, 16, 16))
        return read_checkpoint(path)

    return read


def _onnx() -> list[bytes]:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    shape = ["batch", 3, 4, 4]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])
    weight = numpy_helper.from_array(np.ones((5, 48), np.float32), "w")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(nodes, "g", [image], [out], [weight])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    branch = helper.make_graph([helper.make_node("Relu", ["input"], ["r"])], "b", [], [
        helper.make_tensor_value_info("r", TensorProto.FLOAT, shape)])  # fmt: skip
    both = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)
    other = helper.make_model(helper.make_graph([both], "g", [image, condition], [y]))
    return [whole.SerializeToString(), other.SerializeToString()]


def _read_onnx() -> Read:
    from cswap_deploy.export.onnx import describe_onnx

    return describe_onnx


def _pictures() -> list[bytes]:
    import numpy as np
    from PIL import Image

    from cswap_deploy.runtime.preprocess import FORMATS

    colours = Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for format in FORMATS:
        images = [colours, colours.convert("L")]
        if format not in ("JPEG", "PPM"):
            images += [colours.convert("P"), colours.convert("RGBA")]
        for image in images:
            file = io.BytesIO()
            more = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
            image.save(file, format, **more)
            found.append(file.getvalue())
    for options in ({"progressive": True}, {"optimize": True}):
        file = io.BytesIO()
        colours.save(file, "JPEG", **options)
        found.append(file.getvalue())
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"):
        file = io.BytesIO()
        colours.convert("1" if compression == "group4" else "RGB").save(
            file, "TIFF", compression=compression
        )
        found.append(file.getvalue())
    for kind, more in (("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {})):
        file = io.BytesIO()
        colours.save(file, kind, save_all=True, append_images=[colours.rotate(90)], **more)
        found.append(file.getvalue())
    deep = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20))
    greys = Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20))
    for image, format in ((deep, "PNG"), (deep, "TIFF"), (deep, "PPM"), (greys, "TIFF")):
        file = io.BytesIO()
        image.save(file, format)
        found.append(file.getvalue())
    return [*found, b"P3\n2 2\n255\n" + b"1 2 3 " * 4, b"P1\n3 2\n1 0 1 0 1 0\n"]


def _read_picture() -> Read:
    from cswap_deploy.data.sources import decode
    from cswap_deploy.errors import UsageError
    from cswap_deploy.records.model import Preprocessing

    half = (0.5,) * 3
    square = Preprocessing(input_size=(3, 16, 16), mean=half, std=half, resize_shorter=18)
    wide = square.model_copy(update={"input_size": (3, 12, 20), "exif_rotate": True})

    def read(path: Path) -> object:
        found = decode(path, square), decode(path, wide)
        if all(isinstance(one, str) for one in found):
            raise UsageError(str(found[0]))  # as is said of it, and it is left out
        return found

    return read


def _manifest() -> list[bytes]:
    from made_up_bundle import write_made_up_bundle

    with tempfile.TemporaryDirectory() as folder:
        write_made_up_bundle(Path(folder))
        return [Path(folder, "manifest.json").read_bytes()]


def _read_manifest() -> Read:
    from cswap_deploy.errors import CswapError
    from cswap_deploy.records.bundle import read_bundle
    from cswap_deploy.runtime.bundle import DeviceBundle

    def read(path: Path) -> object:
        try:
            there = DeviceBundle.open(path.parent)
        except CswapError:
            there = None
        return there, read_bundle(path.parent)

    return read


def _plan() -> list[bytes]:
    from made_up_bundle import made_up_plan, magnitude_plan

    return [plan.model_dump_json(indent=1).encode() for plan in (magnitude_plan(), made_up_plan())]


def _read_plan() -> Read:
    from cswap_deploy.records.bundle import read_plan

    return lambda path: read_plan(path.parent)


def _lying_beside(folder: Path) -> None:
    """The plan and the weights, without which no build.json is read."""
    from made_up_bundle import made_up_plan

    (folder / "plan.json").write_text(made_up_plan().canonical_json())
    (folder / "pruned.safetensors").write_bytes(b"weights")


def _build() -> list[bytes]:
    from made_up_bundle import made_up_plan

    from cswap_deploy.config import load_config
    from cswap_deploy.records.bundle import BuildRecord
    from cswap_deploy.records.files import list_files
    from cswap_deploy.records.value import write_sealed

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _lying_beside(folder)
        record = BuildRecord(
            settings=load_config(model="demo-resnet").settings() | made_up_plan().settings,
            prune_key="0" * 64, dense_weights_sha256="0" * 64, files=list_files(folder),
        )  # fmt: skip
        write_sealed(folder / "build.json", record)
        return [(folder / "build.json").read_bytes()]


def _read_build() -> Read:
    from cswap_deploy.records.bundle import read_build

    def read(path: Path) -> object:
        if not path.with_name("plan.json").exists():
            _lying_beside(path.parent)
        return read_build(path.parent)

    return read


def _measurements() -> list[bytes]:
    from cswap_deploy.records.comparison import Ratio, SelfTest
    from cswap_deploy.records.measurements import Device

    test = SelfTest(
        created="2026-11-22T12:00:00Z", ratio=Ratio(value=1.0, low=0.99, high=1.01), spread=0.004,
        smallest=0.01,
        device=Device(cpu="Example CPU", cores=2, memory_mib=7963, platform="Linux x86_64"),
    )  # fmt: skip
    return [test.model_dump_json().encode()]


def _read_measurements() -> Read:
    from cswap_deploy.gate.history import History, measurements_of

    def read(path: Path) -> object:
        found = measurements_of(path)
        history = path.with_name("history.db")
        history.unlink(missing_ok=True)
        return History(history).add(found)

    return read


def _history() -> list[bytes]:
    from cswap_deploy.gate.history import History, Measurement

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "history.db")
        found = [
            Measurement(f"2026-11-{day:02}", "net/b1/p50", 4.0 + day / 100, "ms", runner="here")
            for day in range(1, 20)
        ]
        History(file).add(found)
        return [file.read_bytes()]


def _read_history() -> Read:
    from cswap_deploy.gate.history import History

    def read(path: Path) -> object:
        for rest in ("-wal", "-shm"):
            path.with_name(path.name + rest).unlink(missing_ok=True)
        history = History(path)
        return history.trends(), history.smallest_effect("here")

    return read


def _table() -> list[bytes]:
    from cswap_deploy.records.latency import LatencyTable, TimedGraph
    from cswap_deploy.runtime.node_times import NodeTime

    node = NodeTime(name="conv", op="Conv", ms=0.4, inputs=((1, 3, 8, 8),), outputs=((1, 4, 8, 8),))
    graph = TimedGraph(widths={"conv": 4}, nodes=(node,), ms=0.5)
    table = LatencyTable(
        model="demo-resnet", runtime="onnxruntime 1", device="d", threads=1, batch=1,
        graphs=(graph,),
    )  # fmt: skip
    return [table.model_dump_json().encode()]


def _read_table() -> Read:
    from cswap_deploy.config import load_config
    from cswap_deploy.targets.aim import aim_at

    spec = _spec()

    def read(path: Path) -> object:
        config = load_config(model="demo-resnet", ratio_of="latency", latency_table=path)
        return aim_at(config, spec, lambda count: [])

    return read


PARSERS: dict[str, Parser] = {
    "toml": Parser("a.toml", _toml, partial(bytes_changed, words=_TOML_WORDS), _read_toml),
    "budgets": Parser("b.toml", _budgets, partial(bytes_changed, words=_TOML_WORDS), _read_budgets),
    "class-map": Parser("c.json", _class_map, json_changed, _read_class_map),
    "npz": Parser("d.npz", _npz, partial(zip_changed, words=_NPZ_WORDS), _read_npz),
    "safetensors": Parser("w.safetensors", _safetensors, sized_header_changed, _read_checkpoint),
    "torch.save": Parser("w.pt", _torch_save, _zip_or_bytes, _read_checkpoint),
    "onnx": Parser("m.onnx", _onnx, bytes_changed, _read_onnx),
    "pictures": Parser("p.png", _pictures, png_changed, _read_picture),
    "manifest": Parser("manifest.json", _manifest, sealed_json_changed, _read_manifest),
    "plan": Parser("plan.json", _plan, json_changed, _read_plan),
    "build.json": Parser("build.json", _build, sealed_json_changed, _read_build),
    "history": Parser("h.db", _history, bytes_changed, _read_history),
    "latency-table": Parser("t.json", _table, json_changed, _read_table),
    "measurements": Parser("bench.json", _measurements, json_changed, _read_measurements),
}
"""Name -> parser."""
