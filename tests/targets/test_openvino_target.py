from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.config import ModelConfig
from cswap_deploy.errors import (
    ArtifactError,
    BuildError,
    MissingDependencyError,
    StageError,
)
from cswap_deploy.export.onnx import describe_onnx, export_onnx
from cswap_deploy.models.demos import IMAGES, MEAN, STD
from cswap_deploy.progress import Silent
from cswap_deploy.records.engine import EngineArtifact, OnnxArtifact
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.host import usable_cores
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest, Int8, get_target
from cswap_deploy.targets.openvino import OpenVino, OpenVinoSession

TOLERANCE = 1e-4
CALIBRATION = 40


class SmallViT(nn.Module):
    """One block of attention on 16 patches of a 3x16x16 image."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(y)
        x = x + self.mlp(self.norm2(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


def needs(package: str) -> None:
    """``importorskip`` would import it with its telemetry."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def openvino() -> OpenVino:
    needs("openvino")
    return OpenVino()


@pytest.fixture(scope="module")
def vit_graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = SmallViT()
    path = tmp_path_factory.mktemp("vit") / "vit.onnx"
    return export_onnx(module, input_size=(3, 16, 16), path=path)


@pytest.fixture(scope="module")
def resnet_graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    """The trained demo, by torch's old exporter, which takes a tenth of the time."""
    from cswap_deploy.models.load import load_model

    path = tmp_path_factory.mktemp("resnet") / "resnet.onnx"
    module = load_model(ModelConfig(model="demo-resnet")).module
    torch.onnx.export(
        module, (torch.zeros(2, 1, 28, 28),), path, dynamo=False,
        input_names=["input"], output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )  # fmt: skip
    return describe_onnx(path)


@pytest.fixture(scope="module")
def engine(
    openvino: OpenVino, graph: OnnxArtifact, tmp_path_factory: pytest.TempPathFactory
) -> EngineArtifact:
    """Nobody writes into its folder."""
    folder = tmp_path_factory.mktemp("engine")
    return openvino.build(
        BuildRequest(graph, batch=BatchRange(min=2, opt=4, max=8), out_dir=folder)
    )


@pytest.fixture
def copied(engine: EngineArtifact, tmp_path: Path) -> EngineArtifact:
    """The engine, to damage."""
    folder = shutil.copytree(engine.path.parent, tmp_path / "copied")
    return engine.model_copy(update={"path": folder / engine.path.name})


@pytest.fixture(scope="module")
def vit_engine(
    openvino: OpenVino, vit_graph: OnnxArtifact, tmp_path_factory: pytest.TempPathFactory
) -> EngineArtifact:
    folder = tmp_path_factory.mktemp("vit-engine")
    return openvino.build(BuildRequest(vit_graph, batch=BatchRange(), out_dir=folder))


@pytest.fixture(scope="module")
def quantised_vit(
    openvino: OpenVino, vit_graph: OnnxArtifact, tmp_path_factory: pytest.TempPathFactory
) -> EngineArtifact:
    """With batches of 4 and more, though NNCF measures images one by one."""
    needs("nncf")
    batch, folder = BatchRange(min=4, opt=4, max=8), tmp_path_factory.mktemp("quantised-vit")
    return openvino.build(
        BuildRequest(vit_graph, batch=batch, out_dir=folder, int8=Int8(pictures(8)))
    )


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, 28, 28) normalised, and labels (N,)."""
    with np.load(IMAGES[part]) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    x = (images.reshape(-1, 1, 28, 28).astype(np.float32) / 255 - MEAN[0]) / STD[0]
    return x.astype(np.float32), labels


def test_the_table_has_it() -> None:
    assert isinstance(get_target("openvino"), OpenVino)


def test_an_engine_is_two_files_and_says_what_it_is_for(
    engine: EngineArtifact,
) -> None:
    import openvino

    files = {path.name: path.stat().st_size for path in engine.path.parent.iterdir()}
    assert set(files) == {"model.xml", "model.bin"}
    assert engine.target == "openvino"
    assert engine.path.name == "model.xml"
    assert engine.extra_files == ("model.bin",)
    assert engine.sha256 == sha256_file(engine.path)
    assert engine.size_bytes == sum(files.values())
    assert engine.versions == {"openvino": openvino.__version__.split("-")[0]}
    assert engine.device.startswith("CPU (")
    assert (engine.precision, engine.runnable, engine.notes) == ("fp32", True, ())
    assert engine.batch == BatchRange(min=2, opt=4, max=8)


@pytest.mark.parametrize(
    ("name", "of", "counts"),
    [("engine", "graph", (2, 3, 8)), ("vit_engine", "vit_graph", (1, 3, 16))],
)
def test_logits_are_onnxruntimes(
    openvino: OpenVino, name: str, of: str, counts: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("onnxruntime")
    session = openvino.load(request.getfixturevalue(name))
    assert (session.provider, session.threads) == ("OpenVINO CPU f32", usable_cores())
    reference = OnnxSession(request.getfixturevalue(of).path, threads=1)
    for count in counts:
        images = pictures(count)
        logits = session.run(images)
        assert (logits.shape, logits.dtype) == ((count, logits.shape[1]), np.float32)
        np.testing.assert_allclose(logits, reference.run(images), atol=TOLERANCE)


def test_a_result_is_the_callers_own(openvino: OpenVino, engine: EngineArtifact) -> None:
    session = openvino.load(engine)
    images = pictures(4)
    images.flags.writeable = False
    first = session.run(images[:2])
    before = first.copy()
    session.run(images[2:])
    np.testing.assert_array_equal(first, before)
    np.testing.assert_array_equal(session.run(images[::2]), session.run(images[::2].copy()))


def test_a_float16_graph_is_one_of_float16_weights(
    openvino: OpenVino, vit_graph: OnnxArtifact, vit_engine: EngineArtifact, tmp_path: Path
) -> None:
    import onnx
    import onnx_ir as ir

    from cswap_deploy.export.casting import cast_graph

    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(vit_graph.path)))
    path = tmp_path / "fp16.onnx"
    onnx.save(ir.to_proto(cast_graph(model, to=ir.DataType.FLOAT16)), path)
    half = describe_onnx(path).model_copy(update={"precision": "fp16"})
    built = openvino.build(BuildRequest(half, batch=BatchRange(), out_dir=tmp_path))
    assert built.precision == "fp16"
    assert built.notes == ("openvino computes in float32 on the CPU: only the weights are fp16",)
    sizes = [e.path.with_suffix(".bin").stat().st_size for e in (built, vit_engine)]
    assert sizes[0] < 0.55 * sizes[1]
    session = openvino.load(built)
    assert session.provider == "OpenVINO CPU f32"
    images = pictures(4)
    logits = session.run(images)
    np.testing.assert_allclose(logits, openvino.load(vit_engine).run(images), atol=0.01)


def test_int8_of_a_trained_network_keeps_its_accuracy(
    openvino: OpenVino,
    resnet_graph: OnnxArtifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    needs("nncf")
    told: list[str] = []

    class Listening(Silent):
        def begin(self, what: str, total: int) -> None:
            told.append(what)

    wide, narrow = tmp_path / "fp32", tmp_path / "int8"
    wide.mkdir()
    narrow.mkdir()
    batch = BatchRange(min=1, opt=1, max=50)
    images, labels = fashion("validation")
    calibration = fashion("calibration")[0][:CALIBRATION]
    full = openvino.build(BuildRequest(resnet_graph, batch=batch, out_dir=wide))
    capfd.readouterr()
    built = openvino.build(
        BuildRequest(
            resnet_graph, batch=batch, out_dir=narrow, int8=Int8(calibration), progress=Listening()
        )
    )
    session = openvino.load(built)
    assert capfd.readouterr() == ("", "")
    assert told == ["int8: quantising (NNCF)"]
    assert built.precision == "int8"
    assert set(built.versions) == {"openvino", "nncf"}
    assert built.size_bytes < 0.7 * full.size_bytes
    assert session.provider == "OpenVINO CPU int8"
    dense = openvino.load(full)

    def top1(session: OpenVinoSession) -> float:
        logits = [session.run(images[i : i + 50]) for i in range(0, len(images), 50)]
        return float((np.concatenate(logits).argmax(1) == labels).mean())

    before, after = top1(dense), top1(session)
    assert before > 0.9
    assert abs(before - after) <= 0.01, (before, after)


def test_a_transformer_is_quantised_as_one(
    openvino: OpenVino, vit_graph: OnnxArtifact, quantised_vit: EngineArtifact, tmp_path: Path
) -> None:
    built, batch = quantised_vit, BatchRange(min=4, opt=4, max=8)
    again = openvino.build(
        BuildRequest(vit_graph, batch=batch, out_dir=tmp_path, int8=Int8(pictures(8)))
    )
    assert again.sha256 == built.sha256, "not the same bytes from the same input"
    graph = built.path.read_text()
    assert '<model_type value="transformer" />' in graph
    assert "'overflow_fix': 'enable'" in graph, "wrong sums on processors without VNNI"
    session = openvino.load(built)
    assert "int8" in session.provider
    assert np.isfinite(session.run(pictures(4))).all()


def test_layers_asked_for_stay_in_float32(
    openvino: OpenVino, vit_graph: OnnxArtifact, quantised_vit: EngineArtifact, tmp_path: Path
) -> None:
    from cswap_deploy.targets.openvino import import_openvino

    def quantised(built: EngineArtifact) -> dict[str, bool]:
        """Module of each product with weights -> whether it reads quantised activations."""
        found = {}
        for op in import_openvino().Core().read_model(built.path).get_ops():
            module, _, rest = op.get_friendly_name().partition("/")
            if op.get_type_name() in ("MatMul", "Convolution") and rest:
                given = op.input_value(0).get_node()
                found[module] = given.get_type_name() == "FakeQuantize"
        return found

    everything = quantised(quantised_vit)
    assert set(everything) == {"patches", "qkv", "proj", "mlp.0", "mlp.2", "head"}
    assert all(everything.values())
    int8 = Int8(pictures(8), ("mlp", "head/G*"))
    kept = quantised(
        openvino.build(BuildRequest(vit_graph, batch=BatchRange(), out_dir=tmp_path, int8=int8))
    )
    assert {name for name, narrow in kept.items() if not narrow} == {"mlp.0", "mlp.2", "head"}


def test_a_batch_outside_the_range_is_refused(openvino: OpenVino, engine: EngineArtifact) -> None:
    session = openvino.load(engine)
    assert (session.batch_min, session.batch_max, session.on_gpu) == (2, 8, False)
    assert session.run(pictures(2)).shape == session.run(pictures(8))[:2].shape
    for count in (0, 1, 9):
        with pytest.raises(StageError) as caught:
            session.run(pictures(count))
        assert f"refused a batch of shape ({count}, 3, 16, 16), float32: Can't set" in str(
            caught.value
        )
        assert "model input (shape=[2..8,3,16,16])" in str(caught.value)
        assert "Exception from" not in str(caught.value)
        assert caught.value.log
    with pytest.raises(StageError, match=r"batch of shape \(2, 3, 16, 15\)"):
        session.run(pictures(2)[..., 1:])


def test_threads_are_those_asked_for(openvino: OpenVino, engine: EngineArtifact) -> None:
    assert openvino.load(engine, threads=1).threads == 1
    assert openvino.load(engine, threads=usable_cores()).threads == usable_cores()
    assert openvino.load(engine).threads == usable_cores()


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_altered_and_absent_files(openvino: OpenVino, copied: EngineArtifact, name: str) -> None:
    path = copied.path.with_name(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} is not the file that was built") as caught:
        openvino.load(copied)
    assert caught.value.exit_code == 6
    assert str(caught.value).endswith("fix: build the bundle again")
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"cannot read .*{name}: No such file"):
        openvino.load(copied)


def test_a_graph_without_its_weights_digest_is_not_loaded(
    openvino: OpenVino, copied: EngineArtifact
) -> None:
    copied.path.write_text(copied.path.read_text().replace("cswap_deploy", "something_else"))
    other = copied.model_copy(update={"sha256": sha256_file(copied.path)})
    with pytest.raises(ArtifactError, match="does not say what weights it belongs to"):
        openvino.load(other)


def test_openvinos_words_are_told(
    openvino: OpenVino, graph: OnnxArtifact, unknown_operator: OnnxArtifact, tmp_path: Path
) -> None:
    version = openvino.fingerprint()["openvino"]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BuildError) as caught:
        openvino.build(BuildRequest(unknown_operator, batch=BatchRange(), out_dir=out))
    assert str(caught.value).startswith(f"openvino {version} refused unknown.onnx: ")
    assert "No conversion rule found for operations: my.ops.Wobble" in str(caught.value)
    assert caught.value.log
    path = tmp_path / "half.onnx"
    path.write_bytes(graph.path.read_bytes()[: graph.size_bytes // 2])
    with pytest.raises(BuildError, match=r"refused half\.onnx: .*Model can't be parsed"):
        openvino.build(
            BuildRequest(graph.model_copy(update={"path": path}), batch=BatchRange(), out_dir=out)
        )
    assert list(out.iterdir()) == []


def test_a_graph_with_nothing_to_quantise(openvino: OpenVino, tmp_path: Path) -> None:
    needs("nncf")
    import onnx
    from onnx import helper

    made, given = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("logits", ("batch", 4)), ("input", ("batch", 1, 2, 2)))
    )
    node = helper.make_node("Flatten", ["input"], ["logits"])
    path = tmp_path / "flat.onnx"
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(
            helper.make_graph([node], "flat", [given], [made]), opset_imports=opsets, ir_version=10
        ),
        path,
    )
    images = np.zeros((4, 1, 2, 2), dtype=np.float32)
    with pytest.raises(BuildError, match=r"found nothing to quantise in flat\.onnx"):
        openvino.build(
            BuildRequest(
                describe_onnx(path), batch=BatchRange(), out_dir=tmp_path, int8=Int8(images)
            )
        )


def test_an_absent_package_and_one_that_does_not_load(
    graph: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix = "\n  fix: pip install 'cswap-deploy[openvino]'"
    monkeypatch.setitem(sys.modules, "openvino", None)
    for call in (
        lambda: OpenVino().build(BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path)),
        OpenVino().fingerprint,
    ):
        with pytest.raises(MissingDependencyError) as caught:
            call()
        assert str(caught.value) == f"openvino is not installed{fix}"
        assert caught.value.exit_code == 4
    package = tmp_path / "openvino"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libopenvino.so.1: cannot open')")
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError) as caught:
        OpenVino().fingerprint()
    text = "openvino is installed but does not load: libopenvino.so.1: cannot open"
    assert str(caught.value) == text + fix


def test_int8_without_nncf(
    openvino: OpenVino, graph: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependencyError) as caught:
        openvino.build(
            BuildRequest(graph, batch=BatchRange(), out_dir=tmp_path, int8=Int8(pictures(2)))
        )
    assert str(caught.value) == (
        "nncf is not installed\n  fix: pip install 'cswap-deploy[openvino]'"
    )


def test_nothing_is_printed_sent_or_left_behind_and_ctrl_c_is_noticed(
    vit_graph: OnnxArtifact, tmp_path: Path
) -> None:
    """In a process of its own: under pytest and in CI, NNCF's telemetry is off anyway.

    And a signal on a stack that engines freed when they went would end this process.
    """
    needs("nncf")
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    out.mkdir()
    code = (
        "import gc, logging, signal, sys; from pathlib import Path; import numpy as np\n"
        "from cswap_deploy.settings import BatchRange\n"
        "from cswap_deploy.export.onnx import describe_onnx\n"
        "from cswap_deploy.targets import BuildRequest, Int8\n"
        "from cswap_deploy.targets.openvino import OpenVino\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "graph, out = map(Path, sys.argv[1:])\n"
        "images = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)\n"
        "def session(int8=None):\n"
        "    engine = OpenVino().build(BuildRequest(\n"
        "        describe_onnx(graph), batch=BatchRange(), out_dir=out, int8=int8))\n"
        "    return OpenVino().load(engine)\n"
        "first, second, third = session(Int8(images)), session(), session(Int8(images))\n"
        "first.run(images)\n"
        "assert 'nncf' in sys.modules and 'openvino' in sys.modules\n"
        "assert not [n for n in sys.modules if n.startswith('openvino_telemetry.')]\n"
        "assert logging.getLoggerClass() is logging.Logger\n"
        "del first; gc.collect()\n"
        "del second; gc.collect()\n"
        "del third; gc.collect()\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('noticed')\n"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "NNCF_CI")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(vit_graph.path), str(out)],
        env=kept | {"HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "noticed\n", "")
    assert list(home.rglob("*")) == []
