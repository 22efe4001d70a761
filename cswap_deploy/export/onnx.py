"""PyTorch network to a self-contained ONNX file, and what such a file holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cswap_deploy.errors import ArtifactError, ExportError, first_line, own_words
from cswap_deploy.export.attention import FourDimensions
from cswap_deploy.export.names import exported_modules, name_nodes
from cswap_deploy.models.outputs import INPUT, LOGITS, tensors_alone
from cswap_deploy.progress import captured
from cswap_deploy.records.engine import OnnxArtifact, TensorSpec
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.node_times import GraphNode

BATCH = "batch"
_RETURNED = "returned::"
_PROTOBUF_LIMIT = 2**31
_LEFT_OVER = "BatchNorm nodes directly after a convolution were not folded into it"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def export_onnx(
    module: nn.Module, *, input_size: tuple[int, int, int], path: Path, opset: int = 18,
    outputs: Sequence[str] = (LOGITS,),
) -> OnnxArtifact:  # fmt: skip
    """Export a network with a dynamic batch axis, weights inside the file.

    torch's exporter folds a BatchNorm into the convolution before it; where one is left over, the
    artefact's notes say so. The stack traces that it stores in every node (with this machine's
    paths) are removed, so the same network gives the same bytes everywhere. Nodes are named after
    the PyTorch module that they came from, ``layer1.0.conv1/Conv``, which runtimes' parsers, layer
    lists and profilers then show.

    Args:
        module: Maps (N, C, H, W) float32 to its outputs; set to eval mode here.
        input_size: (C, H, W).
        path: File to write.
        opset: Version of ONNX's operator set, 18 or higher.
        outputs: Names of the tensors that the network returns, in order
            (:func:`models.outputs.named_outputs`).

    Returns:
        The file, with input ``input`` of shape ``("batch", C, H, W)`` and these outputs.

    Raises:
        ExportError: torch refused the network (``err.log`` has its words), the network fixes the
            batch size, or the requested opset was not honoured.

    Source:
        PyTorch documentation, ``torch.onnx.export`` with ``dynamo=True``.
    """
    import onnx

    what = f"{type(module).__name__} on input {'x'.join(map(str, input_size))}"
    proto = _export(module.eval(), input_size, opset, what=what, count=len(outputs))
    _name_outputs(proto.graph, outputs)
    name_nodes(proto.graph, modules=exported_modules(proto.graph))
    _strip_metadata(proto.graph)
    _check_interface(proto.graph, what=what, classes=tuple(outputs) == (LOGITS,))
    honoured = _opset(proto)
    if honoured != opset:
        raise ExportError(
            f"torch {torch.__version__} exported {what} at opset {honoured}, not at {opset}",
            fix=f"--opset {honoured}",
        )
    onnx.save(proto, path)
    return describe_onnx(path).model_copy(update={"notes": batch_norm_notes(path)})


def _export(
    module: nn.Module, input_size: tuple[int, int, int], opset: int, *, what: str, count: int
) -> Any:
    """``onnx.ModelProto`` as torch makes it, the outputs under names that nothing else has."""
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(t.nbytes for t in tensors)
    if size >= _PROTOBUF_LIMIT:
        raise ExportError(
            f"{what} has {size / 2**30:.1f} GiB of weights; a self-contained ONNX file holds "
            "less than 2 GiB",
            fix="prune more, or take a smaller network",
        )
    device = tensors[0].device if tensors else torch.device("cpu")
    # Two images: torch would take a batch of one for a constant.
    example = torch.zeros(2, *input_size, device=device)
    # With gradients attention is laid out in another way while it is traced than later on.
    with captured() as chatter, torch.no_grad(), tensors_alone(module), FourDimensions():
        try:
            program = torch.onnx.export(
                module, (example,), dynamo=True, external_data=False, opset_version=opset,
                input_names=[INPUT], output_names=[f"{_RETURNED}{i}" for i in range(count)],
                dynamic_shapes=({0: BATCH},), verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as err:
            log = _ANSI.sub("", str(err)).splitlines() + chatter.getvalue().splitlines()
            raise ExportError(
                f"torch {torch.__version__} does not export {what}: {_words(err)}", log=tuple(log)
            ) from err
    assert program is not None
    return program.model_proto


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Give the outputs their names; whatever else has one of these gets another."""
    wanted = {f"{_RETURNED}{at}": name for at, name in enumerate(names)}
    taken = {value.name for value in (*graph.initializer, *graph.input, *graph.value_info)}
    taken |= {name for node in graph.node for name in node.output}
    new = dict(wanted)
    for name in taken & set(names):
        new[name] = f"{name}::inner"
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for value in (*graph.initializer, *graph.value_info, *graph.output):
        value.name = new.get(value.name, value.name)


def graph_nodes(path: Path) -> list[GraphNode]:
    """The nodes of an ONNX file, in its order."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return [GraphNode(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in graph.node]


def graph_shapes(path: Path, batch: int) -> dict[str, tuple[int, ...]]:
    """Tensor -> its shape at a batch, for those that shape inference finds whole."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in (*model.graph.value_info, *model.graph.output):
        value.type.tensor_type.ClearField("shape")  # of any batch
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {each.name: tuple(each.dims) for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if all(sizes):
            found[value.name] = tuple(sizes)
    return found


def describe_onnx(path: Path) -> OnnxArtifact:
    """Read what a self-contained ONNX file holds.

    Raises:
        ArtifactError: The file is absent, damaged, not valid ONNX, or keeps weights elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        model = onnx.load(path, load_external_data=False)
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}") from err
    except (DecodeError, ValueError) as err:  # the latter of paths, and of text that is none
        raise ArtifactError(
            f"{path} is not an ONNX file, or is damaged: {first_line(err)}"
        ) from err
    graph = model.graph
    outside = [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise ArtifactError(
            f"{path} keeps {len(outside)} of its {len(graph.initializer)} weight tensors in other "
            "files",
            fix=f"python -c \"import onnx; onnx.save(onnx.load('{path}'), 'model.onnx')\"",
        )
    try:
        onnx.checker.check_model(model)
        given = {tensor.name for tensor in graph.initializer}
        return OnnxArtifact(
            path=path, sha256=sha256_file(path), size_bytes=path.stat().st_size,
            opset=_opset(model), nodes=len(graph.node), precision=_precision(graph),
            inputs=tuple(_spec(v) for v in graph.input if v.name not in given),
            outputs=tuple(_spec(v) for v in graph.output),
        )  # fmt: skip
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as err:
        words = own_words(err)
        raise ArtifactError(f"{path} is not valid ONNX: {first_line(err)}", log=words) from err


def batch_norm_notes(path: Path) -> tuple[str, ...]:
    """A note where BatchNorms alone read a convolution and were not folded into it; else none."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    maker = {name: node.op_type for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    left = sum(
        node.op_type == "BatchNormalization"
        and maker.get(node.input[0]) == "Conv"
        and readers[node.input[0]] == 1
        for node in graph.node
    )
    return (f"{left} {_LEFT_OVER}",) if left else ()


def _check_interface(graph: Any, *, what: str, classes: bool) -> None:
    """One input; one (batch, classes) output, or any of which one has a row an image."""
    inputs = [_spec(value) for value in graph.input]
    outputs = [_spec(value) for value in graph.output]
    shapes = f"inputs {[v.shape for v in inputs]}, outputs {[v.shape for v in outputs]}"
    one = len(outputs) == 1 and len(outputs[0].shape) == 2
    if len(inputs) != 1 or (classes and not one):
        raise ExportError(
            f"{what} is not a classifier of one (batch, C, H, W) input and one (batch, classes) "
            f"output: {shapes}"
        )
    if inputs[0].shape[0] != BATCH or not any(v.shape[:1] == (BATCH,) for v in outputs):
        raise ExportError(
            f"{what} fixes the batch size: {shapes}",
            fix="take the batch from x.shape[0] in forward(), not from a constant",
        )


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    dims = (
        d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim
    )
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        kind = value.type.WhichOneof("value") or "nothing"
        raise ValueError(f"{value.name!r} is a {kind} of type {tensor.elem_type}") from None
    shape = tuple(dims)
    if strange := [text for text in (value.name, *shape) if isinstance(text, bytes)]:
        raise ValueError(f"the name {strange[0]!r} is no UTF-8")  # protobuf then gives its bytes
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def _opset(model: Any) -> int:
    """Version of ONNX's own operators; 0 where the file names none."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _precision(graph: Any) -> str:
    """The narrowest type that the weights are stored in."""
    import onnx

    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return "int8"
    types = {tensor.data_type for tensor in graph.initializer}
    if onnx.TensorProto.FLOAT16 in types:
        return "fp16"
    return "bf16" if onnx.TensorProto.BFLOAT16 in types else "fp32"


def _strip_metadata(graph: Any) -> None:
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")


def _words(err: Exception) -> str:
    """The cause in torch's words: the first paragraph below its own heading."""
    text = _ANSI.sub("", str(err))
    _, _, summary = text.partition("## Exception summary")
    first = (summary or text).strip().split("\n\n")[0]
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", first.split("\n⬆️")[0])
