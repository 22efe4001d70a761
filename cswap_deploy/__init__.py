"""Prune a PyTorch vision network without training and ship it as a checked, measured engine.

import cswap_deploy

bundle = cswap_deploy.build("demo-resnet", ratio=0.4)
print(bundle.manifest.targets[0].accuracy.drop)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cswap_deploy.api import Bundle, build, check, load, prune
    from cswap_deploy.config import Config
    from cswap_deploy.errors import CswapError

    __version__: str

__all__ = ["Bundle", "Config", "CswapError", "__version__", "build", "check", "load", "prune"]
_HOMES = dict.fromkeys(("Bundle", "build", "check", "load", "prune"), "api") | {
    "Config": "config",
    "CswapError": "errors",
}


def __getattr__(name: str) -> Any:
    # `cswap-deploy --help` imports this package; what it does not need is imported on first use.
    import importlib
    from importlib.metadata import version

    if name == "__version__":
        return version("cswap-deploy")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
