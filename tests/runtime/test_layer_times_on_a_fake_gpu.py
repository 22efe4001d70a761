"""Layers of TensorRT engines, timed on a FAKE GPU (see ``fake_gpu``), and given to their nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_gpu import layers_of
from fake_gpu_bench import ONNX, Bench, every_package, images
from small_onnx import SHAPE

from cswap_deploy.errors import StageError
from cswap_deploy.export.onnx import graph_nodes, graph_shapes
from cswap_deploy.records.latency import LatencyTable
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.cli import main as cswap_run
from cswap_deploy.runtime.node_times import Graph
from cswap_deploy.runtime.tensorrt_times import of_layers, time_in_tensorrt

BATCH = 2


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    path = tmp_path / "model.onnx"
    path.write_bytes(ONNX)
    return Graph(path, graph_nodes(path), graph_shapes(path, BATCH))


@every_package
def test_layers_count_to_the_products_that_they_were_made_of(
    bench: Callable[..., Bench], package: str, graph: Graph
) -> None:
    b = bench(package)
    found = time_in_tensorrt([graph, graph], images(BATCH), threads=None, runs=3, target=b.target)
    assert len(found) == 2
    for times in found:
        assert times.ms > 0
        nodes = {node.name: node for node in times.nodes}
        assert len(nodes) == len(times.nodes)
        products = [n for n in graph.nodes if n.op in ("Conv", "Gemm", "MatMul")]
        assert products
        for product in products:
            node = nodes[product.name]
            assert node.op == product.op
            assert node.outputs[0][0] == BATCH
            assert len(node.inputs) >= 2
        made = sum(0.125 * at for at in range(len(layers_of(ONNX))))
        assert sum(node.ms for node in times.nodes) == pytest.approx(made), "nothing is lost"
        assert "start>Reformatting CopyNode for Input Tensor  to x" in nodes
    assert not b.gpu.stack, "the GPU was given back"


def test_a_region_is_shared_out_by_multiply_accumulates(graph: Graph) -> None:
    nodes = [
        graph.nodes[0]._replace(name="a", op="MatMul", inputs=("x", "w"), outputs=("y",)),
        graph.nodes[0]._replace(name="b", op="Softmax", inputs=("y",), outputs=("z",)),
        graph.nodes[0]._replace(name="c", op="MatMul", inputs=("z", "v"), outputs=("o",)),
    ]
    shapes = {"x": (4, 8), "w": (8, 6), "y": (4, 6), "z": (4, 6), "v": (6, 2), "o": (4, 2)}
    small = Graph(graph.path, nodes, shapes)
    (first, second) = of_layers({"{ForeignNode[a...c]}": [8.0] * 9}, {}, small)
    macs = 4 * 6 * 8, 4 * 2 * 6
    assert (first.name, second.name) == ("a", "c")
    assert first.ms == pytest.approx(8 * macs[0] / sum(macs))
    assert first.ms + second.ms == pytest.approx(8.0)
    unknown = of_layers({"{ForeignNode[a...c]}": [8.0] * 9}, {}, small._replace(shapes={}))
    assert [node.ms for node in unknown] == [4.0, 4.0], "without shapes, alike"


def test_a_kit_is_timed_on_the_gpu_by_cswap_run(
    bench: Callable[..., Bench], graph: Graph, tmp_path: Path
) -> None:
    b = bench()
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "0.onnx").write_bytes(ONNX)
    told = {
        "schema_version": 1, "model": "small", "batch": BATCH,
        "input_size": SHAPE,
        "graphs": [{
            "file": "0.onnx", "sha256": sha256_file(kit / "0.onnx"), "widths": {"conv": 8},
            "nodes": [list(node) for node in graph.nodes], "shapes": graph.shapes,
        }],
    }  # fmt: skip
    (kit / "kit.json").write_text(json.dumps(told))
    file = tmp_path / "device.json"
    assert cswap_run([str(kit), "--profile", "--target", b.target, "-o", str(file)]) == 0
    table = LatencyTable.model_validate_json(file.read_bytes())
    assert table.runtime == f"{b.target} {b.version}"
    assert "compute capability 8.9" in table.device
    assert table.batch == BATCH


def test_a_graph_that_the_parser_refuses_is_named(
    bench: Callable[..., Bench], graph: Graph
) -> None:
    b = bench()
    b.trt.script.parser_errors = [{"desc": "no"}]
    with pytest.raises(StageError, match=r"builds no engine of .*model\.onnx"):
        time_in_tensorrt([graph], images(BATCH), threads=None, runs=1, target=b.target)
