"""Import timm beside a CPU build of torch.

PyPI's torchvision is compiled against CUDA torch. Beside a CPU torch its extension does not load,
two operators stay undeclared, and ``import torchvision`` (so ``import timm``) raises. Classifiers
use neither operator; declaring their schemas is enough to import.
"""

from __future__ import annotations

import sys
from types import ModuleType

_SYMPTOM = "operator torchvision::nms does not exist"
_kept: list[object] = []  # the declarations die with their library


def import_timm() -> ModuleType:
    """``import timm``, mended where torchvision does not match torch."""
    try:
        import timm
    except RuntimeError as err:
        if _SYMPTOM not in str(err):
            raise
        _declare_operators()
        import timm
    module: ModuleType = timm
    return module


def _declare_operators() -> None:
    import torch

    for name in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _kept.append(library)
    boxes = "Tensor dets, Tensor scores, float iou_threshold"
    for operator in ("nms", "qnms"):
        library.define(f"{operator}({boxes}) -> Tensor")  # type: ignore[no-untyped-call]
