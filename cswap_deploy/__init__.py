"""Prune a PyTorch vision network without training and ship it as a checked, measured engine.

import cswap_deploy

bundle = cswap_deploy.build("demo-resnet", ratio=0.4)
print(bundle.manifest.targets[0].accuracy.drop)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import CswapError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from cswap_deploy.old_config import BuildConfig
    from cswap_deploy.pipeline import Bundle
    from cswap_deploy.progress import Progress

    __version__: str

__all__ = ["BuildConfig", "Bundle", "CswapError", "__version__", "build"]
_HOMES = {"BuildConfig": "cswap_deploy.old_config", "Bundle": "cswap_deploy.pipeline"}


def __getattr__(name: str) -> Any:
    # `cswap-deploy --help` imports this package; what it does not need is imported on first use.
    import importlib
    from importlib.metadata import version

    if name == "__version__":
        return version("cswap-deploy")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(
    model: str | nn.Module,
    *,
    data: str | Path | None = None,
    ratio: float | None = None,
    output: str | Path | None = None,
    config: Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Bundle:
    """Prune a pretrained classifier, export it, build engines, and check them.

    The command ``cswap-deploy build`` calls this function.

    Args:
        model: A demo or timm name, ``"package.module:factory"``, or a module in eval mode (then
            ``input_size``, ``mean`` and ``std`` are needed).
        data: Image folder, ``.npz`` file or ``"hf:NAME[:split]"``; what the model brings unless
            said.
        ratio: Fraction of the parameters to remove (see ``ratio_of``), 0 <= ratio < 1; 0.4 unless
            said here or in ``config``.
        output: The bundle's folder.
        config: TOML file of settings; arguments win over it.
        progress: Told of everything that takes time.
        **settings: Any other field of :class:`BuildConfig`.

    Returns:
        The bundle's path, plan and manifest.

    Raises:
        CswapError: A subclass says what failed and how to mend it; see ``cswap_deploy.errors``.
    """
    from cswap_deploy.old_config import load_config
    from cswap_deploy.pipeline import build as run

    named = model if isinstance(model, str) else type(model).__name__
    validation = settings.get("validation_data")
    settings |= {
        "model": named,
        "validation_data": None if validation is None else str(validation),
        "data": None if data is None else str(data),
        "ratio": ratio,
        "output": output,
    }
    merged = load_config(config, **settings)
    return run(merged, module=None if isinstance(model, str) else model, progress=progress)
