"""The compiled kernel behind ``fanout``: found or built, loaded, called through ctypes.

It is looked for in the package ``cswap_kernels`` (``pip install ./kernels``), then built from the
sources of a checkout by nvcc, once per machine, source and GPU generation. It knows nothing of
torch's C++ side, so a new torch needs no new build. ``torch.utils.cpp_extension`` would link it to
that, needs ninja, and finds no CUDA_HOME in a CPU build of torch; so nvcc is called here.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock
from torch import Tensor

from cswap_deploy.network.unfolding import Window

SWITCH = "CSWAP_KERNELS"
"""Environment variable; ``off`` keeps to the reference."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What the kernel stores, and its number for each."""
SOURCES = Path(__file__).parents[2] / "kernels" / "masked_fanout"
"""There in a checkout, and absent where the package was installed as a wheel."""
_FILES = ("masked_fanout.h", "masked_fanout.cu")
_FLAGS = (
    "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xlinker", "--exclude-libs,ALL",
)  # fmt: skip
ABI = 1
"""Version of the C interface."""
_POINTERS = ("z", "r", "weight", "other", "scale", "shift", "constant", "out")
_BUILD_SECONDS = 600

_log = logging.getLogger(__name__)


class Params(ctypes.Structure):
    """``MaskedFanoutParams`` of masked_fanout.h, field by field."""

    _fields_ = tuple(
        (name, kind)
        for kind, names in (
            (ctypes.c_void_p, _POINTERS),
            (ctypes.c_int64, ("out_stride_v",)),
            (ctypes.c_int64 * 5, ("r_stride", "weight_stride")),
            (ctypes.c_int32, ("variants", "images", "channels", "unit_inputs")),
            (ctypes.c_int32, ("in_height", "in_width", "out_height", "out_width")),
            (ctypes.c_int32 * 2, ("kernel", "stride", "padding", "dilation")),
            (ctypes.c_int32, ("dtype", "channels_innermost", "activation", "variants_per_tile")),
            (ctypes.c_float, ("low", "high")),
        )
        for name in names
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """The kernel's arguments, checked and laid out; see masked_fanout.h."""

    z: Tensor
    r: Tensor
    """(V, N, B, H, W), any strides."""
    weight: Tensor
    """(V, O, B, kh, kw), any strides."""
    other: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    constant: Tensor | None
    out: Tensor
    channels_innermost: bool
    channels: int
    out_size: tuple[int, int]
    window: Window
    activation: int
    low: float
    high: float

    def params(self, *, variants_per_tile: int = 0) -> Params:
        """The C struct; it points into the tensors, which must outlive it."""
        tensors = {name: getattr(self, name) for name in _POINTERS}
        pointers = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
        variants, images, inputs, in_height, in_width = self.r.shape
        out_height, out_width = self.out_size
        return Params(
            **pointers, **asdict(self.window), out_stride_v=self.z.numel(),
            r_stride=self.r.stride(), weight_stride=self.weight.stride(),
            variants=variants, images=images, channels=self.channels, unit_inputs=inputs,
            in_height=in_height, in_width=in_width, out_height=out_height, out_width=out_width,
            dtype=DTYPES[self.z.dtype], channels_innermost=self.channels_innermost,
            activation=self.activation, variants_per_tile=variants_per_tile,
            low=self.low, high=self.high,
        )  # fmt: skip


class Library:
    """One loaded build of the kernel."""

    def __init__(self, path: Path, *, entry: str = "masked_fanout_launch") -> None:
        """Load a build; ``entry`` is ``masked_fanout_host`` in the host build.

        Raises:
            OSError: It does not load.
            ValueError: It was built for another version of this package.
        """
        self.path = path
        self.handle = ctypes.CDLL(str(path))
        expected = ABI << 16 | ctypes.sizeof(Params)
        found = self.handle.masked_fanout_abi()
        if found != expected:
            raise ValueError(f"{path} has interface {found:#x}, this version needs {expected:#x}")
        self._launch = getattr(self.handle, entry)
        self._launch.argtypes = (ctypes.POINTER(Params), ctypes.c_void_p)

    def run(self, problem: Problem, *, stream: int, variants_per_tile: int = 0) -> None:
        """Compute ``problem.out``; on a GPU, put the work on a stream and return."""
        params = problem.params(variants_per_tile=variants_per_tile)
        code = self._launch(ctypes.byref(params), stream)
        if code != 0:
            raise RuntimeError(
                f"masked_fanout did not start: {self.words(code)} "
                f"(z {tuple(problem.z.shape)}, r {tuple(problem.r.shape)}, "
                f"weight {tuple(problem.weight.shape)}, {problem.z.dtype})"
            )

    def ready(self) -> str | None:
        """Why the current GPU cannot run this build; ``None`` where it can."""
        code = self.handle.masked_fanout_ready()
        return None if code == 0 else self.words(code)

    def words(self, code: int) -> str:
        """CUDA's name for an error."""
        if not hasattr(self.handle, "masked_fanout_error"):
            return f"error {code}"
        self.handle.masked_fanout_error.restype = ctypes.c_char_p
        text: bytes = self.handle.masked_fanout_error(code)
        return f"{text.decode()} ({code})"


def cuda_library(device: torch.device) -> Library | None:
    """The kernel for one CUDA device; ``None`` where there is none, with the reason logged once."""
    return library_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def library_of(index: int) -> Library | None:
    """The kernel for a CUDA device; looked for once."""
    found = find_library(index)
    if isinstance(found, str):
        _log.warning("masked_fanout runs on torch, not on its CUDA kernel: %s", found)
        return None
    _log.info("masked_fanout runs on the kernel in %s", found.path)
    return found


def find_library(index: int) -> Library | str:
    """A library that runs on a device, or why there is none."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    reasons = []
    with torch.cuda.device(index):
        for candidate in (_installed, _built):
            try:
                library = Library(candidate(torch.cuda.get_device_capability(index)))
                unready = library.ready()
            except (OSError, ValueError, AttributeError) as err:
                unready = str(err)
            if unready is None:
                return library
            reasons.append(unready)
    return "; ".join(reasons)


def _installed(_: tuple[int, int]) -> Path:
    """The library that ``pip install ./kernels`` left."""
    try:
        package = import_module("cswap_kernels")
    except ImportError as err:
        raise OSError("cswap_kernels is not installed (pip install ./kernels)") from err
    return Path(package.library_path())


def _built(capability: tuple[int, int]) -> Path:
    return build_library(
        capability, cache_dir=platformdirs.user_cache_path("cswap-deploy") / "kernels"
    )


def build_library(capability: tuple[int, int], *, cache_dir: Path, sources: Path = SOURCES) -> Path:
    """Compile the kernel for one GPU generation, unless this machine has done so.

    Args:
        capability: Compute capability, e.g. (8, 6).
        cache_dir: Made where it is missing; shared by all processes of the user. A library's name
            has a digest of sources, compiler and flags, so nothing stale is ever found.
        sources: The folder of the ``.cu`` file.

    Raises:
        OSError: No sources, no nvcc, an unwritable folder, or nvcc failed; has nvcc's words.
    """
    if not all((sources / name).is_file() for name in _FILES):
        raise OSError("the kernel's sources are not there (this is no checkout)")
    nvcc = find_nvcc()
    if nvcc is None:
        raise OSError("nvcc was found neither in CUDA_HOME, on PATH nor in /usr/local/cuda")
    arch = "{}{}".format(*capability)
    flags = (*_FLAGS, "-gencode", f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]")
    version = _output(nvcc, "--version")
    digest = hashlib.sha256()
    for part in (*((sources / n).read_bytes() for n in _FILES), version.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update("\0".join(flags).encode())
    target = cache_dir / f"masked_fanout-sm{arch}-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if target.is_file():  # another process was faster
            return target
        _log.info("building %s with %s", target.name, nvcc)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".build-") as scratch:
            made = Path(scratch) / target.name
            _output(nvcc, *flags, str(sources / "masked_fanout.cu"), "-o", str(made))
            os.replace(made, target)  # whole or absent, even when the machine stops here
    return target


def find_nvcc() -> Path | None:
    """CUDA's compiler: of ``CUDA_HOME``, on ``PATH``, or where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME")
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return Path(path)
    return None


def _output(*command: Path | str) -> str:
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True,
            timeout=_BUILD_SECONDS,
        )  # fmt: skip
    except subprocess.CalledProcessError as err:
        words = (err.stderr or err.stdout).strip().splitlines()
        raise OSError(f"{command[0]} failed: {' | '.join(words[-5:])}") from err
    except subprocess.TimeoutExpired as err:
        raise OSError(f"{command[0]} took over {_BUILD_SECONDS} s") from err
    return done.stdout
