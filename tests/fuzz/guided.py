"""Fuzzing guided by coverage, with atheris: `python -m fuzz.guided PARSER [libFuzzer's flags]`.

atheris is no dependency of this project: install it into an environment of its own that has the
project too. Only our own code is instrumented; a fault ends the run and leaves its file.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cswap_deploy"]):
    from cswap_deploy.errors import CswapError
    from fuzz.parsers import PARSERS


def main() -> None:
    name = sys.argv.pop(1)
    parser = PARSERS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    path, corpus = folder / parser.file, folder / "corpus"
    corpus.mkdir()
    for at, seed in enumerate(parser.seeds()):
        (corpus / str(at)).write_bytes(seed)
    with atheris.instrument_imports(include=["cswap_deploy"]):
        read = parser.reader()

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except CswapError:
            return

    warnings.simplefilter("ignore")
    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
