"""What each of the three TensorRT packages has, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import MissingDependencyError, UsageError

COMPAT = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
"""``BuilderOptions.hardware_compat`` -> member of ``HardwareCompatibilityLevel``."""


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one package has, and what the others have instead."""

    strongly_typed_flag: bool
    """Networks are strongly typed only if asked; 11 knows nothing else."""
    hardware_compat: tuple[str, ...]
    """Levels of ``BuilderOptions.hardware_compat`` beside ``none``."""
    version_compatible: bool
    compute_capabilities: bool
    """Engines are built ahead of time, for GPUs that are named."""
    timing_cache: bool
    needs_gpu: bool
    """To build."""


FLAVOURS: dict[tuple[str, int], Flavour] = {
    ("tensorrt", 10): Flavour(
        strongly_typed_flag=True, hardware_compat=("ampere+", "same-cc"), version_compatible=True,
        compute_capabilities=False, timing_cache=True, needs_gpu=True,
    ),
    ("tensorrt", 11): Flavour(
        strongly_typed_flag=False, hardware_compat=("ampere+", "same-cc"), version_compatible=True,
        compute_capabilities=False, timing_cache=True, needs_gpu=True,
    ),
    # Timing caches are no-ops since 1.2; a level of hardware compatibility is met with a warning;
    # version compatibility wants a lean runtime that the package does not bring.
    ("tensorrt_rtx", 1): Flavour(
        strongly_typed_flag=False, hardware_compat=(), version_compatible=False,
        compute_capabilities=True, timing_cache=False, needs_gpu=False,
    ),
}  # fmt: skip
"""(package, major version) -> what it has. Checked with the bindings of 10.3 (JetPack 6), 10.16,
11.4 and RTX 1.7."""


def flavour_of(module: str, trt: Any) -> Flavour:
    """A package's row of the table; ``module`` is its name.

    Raises:
        MissingDependencyError: It is a version that this project does not know.
    """
    major = int(str(trt.__version__).partition(".")[0])
    found = FLAVOURS.get((module, major))
    if found is None:
        known = ", ".join(str(m) for name, m in FLAVOURS if name == module)
        raise MissingDependencyError(
            f"{module} {trt.__version__} is not supported; supported major versions: {known}",
            fix=f"pip install '{module.replace('_', '-')}=={known.split(', ')[-1]}.*'",
        )
    return found


def check_options(trt: Any, flavour: Flavour, options: BuilderOptions, *, what: str) -> None:
    """Refuse what a package does not have, rather than leave it out silently.

    Raises:
        UsageError: One of the options is not there; it begins with ``what``.
    """
    level = options.hardware_compat
    if level != "none" and (
        level not in flavour.hardware_compat
        or not hasattr(trt.HardwareCompatibilityLevel, COMPAT[level])
    ):
        fix = "--compute-capability" if flavour.compute_capabilities else None
        raise UsageError(f"{what} has no --hardware-compat {level}", fix=fix)
    if options.version_compatible and not flavour.version_compatible:
        raise UsageError(
            f"{what} has no --version-compatible: its engines run with its own version",
            fix="build again for each version of the runtime",
        )
    if options.compute_capability and not flavour.compute_capabilities:
        raise UsageError(
            f"{what} builds for the GPU at hand and takes no --compute-capability",
            fix="--hardware-compat ampere+, or --target tensorrt-rtx",
        )
    for text in options.compute_capability:
        if not hasattr(trt.ComputeCapability, capability_name(text)):
            known = sorted(n[2:] for n in vars(trt.ComputeCapability) if n.startswith("SM"))
            raise UsageError(
                f"{what} does not build for compute capability {text}; known: "
                f"{', '.join(f'{n[:-1]}.{n[-1]}' for n in known)}"
            )


def capability_name(text: str) -> str:
    """``8.9`` as RTX names it, ``SM89``."""
    return f"SM{text.replace('.', '')}"
