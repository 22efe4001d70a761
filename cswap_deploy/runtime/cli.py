"""The command ``cswap-run``: run pictures through a bundle, on the device.

Needs NumPy, Pillow and a runtime for the engine; never torch. Results go to stdout, everything else
to stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cswap_deploy.errors import MissingDependencyError, UsageError, printable
from cswap_deploy.runtime.process import guarded

if TYPE_CHECKING:
    from cswap_deploy.runtime.classifier import Classifier, Guess

_LONGEST_NAME = 255
"""Bytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit codes are those of ``cswap-deploy``."""
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)

    def fail(code: int, message: str) -> None:
        print(f"error: {printable(message)}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": message, "exit_code": code}))

    return guarded(lambda: _command(arguments), fail)


def _command(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.images or options.profile):
        parser.error("the following arguments are required: IMAGE|DIR")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
        sys.stdout.reconfigure(errors="surrogateescape")
    return _profile(options) if options.profile else _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cswap-run", description="Run pictures through a bundle of cswap-deploy."
    )
    add = parser.add_argument
    add("bundle", type=_path, help="the folder that `cswap-deploy build` left")
    add("images", type=_path, nargs="*", metavar="IMAGE|DIR", help="pictures, or folders of them")
    add(
        "--profile", action="store_true",
        help="time every node of the graphs that `cswap-deploy profile-kit` left in BUNDLE, into "
        "the file of -o (.json)",
    )  # fmt: skip
    add("--top", type=_positive, default=5, metavar="N", help="classes for each picture (5)")
    add("--batch", type=_positive, default=1, metavar="N", help="pictures that run together (1)")
    add(
        "--target", metavar="NAME",
        help="tensorrt, tensorrt-rtx, onnxruntime, onnxruntime-cuda (the bundle's engine where it "
        "fits, else onnxruntime)",
    )  # fmt: skip
    add("--threads", type=_positive, metavar="N", help="of onnxruntime on the CPU (all cores)")
    add("--cuda-graph", action="store_true", help="replay the engine's work as a CUDA graph")
    add(
        "-o", "--output", type=_path, metavar="FILE",
        help="(.npz) every output by name, and the pictures' names ('files')",
    )  # fmt: skip
    add("--save-input", type=_path, metavar="FILE.npy", help="also write the network's input")
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _run(options: argparse.Namespace) -> int:
    try:
        import numpy as np

        from cswap_deploy.runtime.bundle import DeviceBundle
        from cswap_deploy.runtime.classifier import Classifier
        from cswap_deploy.runtime.preprocess import normalise
    except ImportError as err:
        raise MissingDependencyError(str(err), fix="pip install numpy pillow") from err

    files = _pictures(options.images)
    DeviceBundle.open(options.bundle).verify()
    classifier = Classifier.open(
        options.bundle, target=options.target, threads=options.threads,
        cuda_graph=options.cuda_graph,
    )  # fmt: skip
    classifier.check_batch(options.batch, pictures=len(files))
    for note in classifier.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{classifier.bundle.model} on {classifier.provider}", file=sys.stderr)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    seen = []
    kept: dict[str, list[Any]] = {}
    for start in range(0, len(files), options.batch):
        readable = []
        for file in files[start : start + options.batch]:
            try:
                readable.append((file, classifier.prepare(file)))
            except UsageError as err:
                failed.append(str(file))
                print(f"error: {printable(str(err))}", file=sys.stderr)
        pixels = [picture for _, picture in readable]
        if options.save_input is not None:
            seen += pixels
        told = _results(classifier, pixels, options, kept) if pixels else []
        for (file, _), result in zip(readable, told):  # noqa: B905 Python 3.9 has no strict
            results.append({"image": str(file), **result})
            if not options.json:
                print("\n  ".join([str(file), *_lines(result)]))
    for what, count in classifier.oddities.items():
        print(f"note: {count} of {len(files)} pictures {what}", file=sys.stderr)
    if seen:
        _save(options.save_input, np.save, normalise(np.stack(seen), classifier.bundle.transform))
    if kept:
        names = np.array([result["image"] for result in results])
        rows = classifier.bundle.rows
        arrays = {_key(n): np.concatenate(v) if n in rows else v[0] for n, v in kept.items()}
        _save(options.output, np.savez, files=names, **arrays)
    if options.json:
        about = {"target": classifier.target, "provider": classifier.provider}
        print(json.dumps(about | {"images": results, "unreadable": failed}))
    return UsageError.exit_code if failed else 0


def _profile(options: argparse.Namespace) -> int:
    try:
        from cswap_deploy.runtime.profiling import profile
    except ImportError as err:
        raise MissingDependencyError(str(err), fix="pip install numpy") from err
    if options.output is None or options.images:
        raise UsageError("--profile takes a kit and -o", fix="cswap-run --profile KIT -o FILE.json")
    target = options.target or "onnxruntime"
    table = profile(options.bundle, target=target, threads=options.threads)
    dense = table["graphs"][0]
    told = f"{table['model']} takes {dense['ms']:.3f} ms, {len(dense['nodes'])} nodes, in {target}"
    _save(options.output, lambda file: file.write(json.dumps(table).encode()))
    print(json.dumps({"file": str(options.output)}) if options.json else options.output)
    print(told, file=sys.stderr)
    return 0


def _results(
    classifier: Classifier, pixels: Sequence[Any], options: argparse.Namespace,
    kept: dict[str, list[Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """For each of N > 0 pictures its classes, or the shapes of its outputs.

    ``kept`` is given the outputs where they are to be saved.
    """
    classify = classifier.bundle.task == "classify"
    outputs = {}
    if not classify or options.output is not None:
        outputs = classifier.outputs(pixels)
    for name, value in outputs.items() if options.output is not None else ():
        kept.setdefault(name, []).append(value)
    if classify:
        return [_classes(guesses) for guesses in classifier.classify(pixels, top=options.top)]
    rows = classifier.bundle.rows
    shapes = {n: list(v.shape[1:] if n in rows else v.shape) for n, v in outputs.items()}
    return [{"outputs": shapes}] * len(pixels)


def _classes(guesses: Sequence[Guess]) -> dict[str, Any]:
    top = [{"class": g.index, "name": g.name, "probability": g.probability} for g in guesses]
    return {"top": top}


def _lines(result: Mapping[str, Any]) -> list[str]:
    """One picture's result for people."""
    if "top" in result:
        return [
            f"{100 * guess['probability']:6.2f} %  {printable(guess['name'])}"
            for guess in result["top"]
        ]
    return [
        f"{printable(name)} ({', '.join(map(str, s))})" for name, s in result["outputs"].items()
    ]


def _key(name: str) -> str:
    """An output's name in the file; two names have a meaning there already."""
    return f"{name}_" if name in ("file", "files") else name


def _save(path: Path, write: Callable[..., None], *values: Any, **named: Any) -> None:
    """To the file of exactly this name: NumPy would add a suffix."""
    try:
        with path.open("wb") as file:
            write(file, *values, **named)
    except OSError as err:
        raise UsageError(f"cannot write {path}: {err.strerror or err}") from err


def _pictures(given: Sequence[Path]) -> list[Path]:
    """Files as they are; of a folder its pictures, at any depth, sorted."""
    from cswap_deploy.runtime.preprocess import PICTURE_SUFFIXES, find_pictures

    found: list[Path] = []
    for path in given:
        if path.is_dir():
            try:
                inside, _ = find_pictures(path)
            except OSError as err:
                raise UsageError(f"cannot list {err.filename}: {err.strerror}") from err
            if not inside:
                kinds = ", ".join(sorted(PICTURE_SUFFIXES))
                raise UsageError(f"{path} holds no pictures ({kinds})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"{path} does not exist")
    return found


def _path(text: str) -> Path:
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text[:50]!r}... has a name that no file has: too long")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
