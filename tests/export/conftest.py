"""Two networks of timm as graphs, exported once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from timm_graphs import Exported, randomise_norms

from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.models.torchvision_shim import import_timm


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A network of timm with 10 classes on (3, 32, 32), by its name."""
    kept: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in kept:
            arguments = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
            module = import_timm().create_model(name, num_classes=10, **arguments).eval()
            randomise_norms(module)
            folder = tmp_path_factory.mktemp(name)
            opset = 22 if name.startswith("vit") else 18
            path = folder / "model.onnx"
            graph = export_onnx(module, input_size=(3, 32, 32), path=path, opset=opset)
            kept[name] = Exported(module, graph, folder)
        return kept[name]

    return make
