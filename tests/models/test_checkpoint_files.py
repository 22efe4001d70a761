"""A file that is no checkpoint is called what it is, whatever its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cswap_deploy.errors import UsageError
from cswap_deploy.models.checkpoints import read_checkpoint

PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in · GitHub</title></head><body></body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102530333\n"


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def saved() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, out)
    return out.getvalue()


def arrays() -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.zeros(3))
    return out.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "page": (PAGE.encode(), "is an HTML page ('Sign in · GitHub'), not the weights"),
    "page after blanks": (b"\n\n  \r\n" + PAGE.lower().encode(), "is an HTML page"),
    "page with a mark": (b"\xef\xbb\xbf" + PAGE.encode(), "is an HTML page"),
    "page in UTF-16": (PAGE.encode("utf-16"), "is an HTML page"),
    "page in Latin-1": (PAGE.encode("latin-1"), "is an HTML page"),
    "page without doctype": (b"<html><body>404</body></html>", "is an HTML page, not"),
    "page after a comment": (b"<!-- cdn 7 -->\n" + PAGE.encode(), "is an HTML page"),
    "long page": (PAGE.encode() + "é".encode() * 20000, "is an HTML page"),
    "packed page": (gzip.compress(PAGE.encode()), "is an HTML page ('Sign in · GitHub'), not the"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML document"),
    "LFS": (POINTER.encode(), "is a Git LFS pointer, not the weights"),
    "LFS on Windows": (POINTER.replace("\n", "\r\n").encode(), "is a Git LFS pointer"),
    "annex": (b"../../.git/annex/objects/xx/MD5-s1--0.pth", "is a git-annex pointer"),
    "empty": (b"", "is empty (0 bytes)"),
    "blanks": (b" \n\n", "holds nothing but blanks"),
    "error": (b'{"error":"Repository not found"}', "is a server's error message, not the weights"),
    "JSON": (b' {"epochs": 3}', "is a JSON file, not the weights"),
    "index": (b'{"weight_map": {"a": "model-00001.safetensors"}}', "is the index of a checkpoint"),
    "words": (b"Entry not found", "is a text file, not the weights: 'Entry not found'"),
    "gzip": (gzip.compress(saved()), "is a gzip archive"),
    "bzip2": (bz2.compress(saved()), "is a bzip2 archive"),
    "zip": (zipped(**{"a.txt": b"a", "b.pth": saved()}), "is a zip archive and no checkpoint of"),
    "arrays": (arrays(), "is a NumPy archive and no checkpoint of torch"),
    "cut": (saved()[:-40], "was cut short"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "is a PNG picture"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_what_it_is(tmp_path: Path, name: str, suffix: str) -> None:
    content, words = FILES[name]
    file = tmp_path / f"w.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UsageError) as err:
        read_checkpoint(file)
    assert words in str(err.value)
    assert str(file) in str(err.value)
    assert err.value.fix
    assert err.value.exit_code == 2


def test_what_an_error_says_is_shown(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(json.dumps({"message": "Bad credentials"}).encode())
    with pytest.raises(UsageError, match="Bad credentials"):
        read_checkpoint(tmp_path / "w.bin")


def test_a_folder_names_the_file_in_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is not a file but a folder") as err:
        read_checkpoint(tmp_path)
    assert err.value.fix == f"pass {tmp_path / 'model.safetensors'}"


def test_a_pickle_of_protocol_0_is_still_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": [1]}, protocol=0))
    with pytest.raises(UsageError) as err:
        read_checkpoint(tmp_path / "w.pkl")
    assert "text file" not in str(err.value)


class HyperParameters:
    """What Lightning pickles beside the weights."""


@pytest.mark.parametrize("whole", [False, True], ids=["lightning", "module"])
def test_the_fix_for_a_pickle_of_objects_works(tmp_path: Path, whole: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    module[0].weight = torch.nn.Parameter(torch.randn(3, 2).T)  # not contiguous
    content: Any = module
    if not whole:
        content = {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": module.state_dict(),
            "hyper_parameters": {"h": HyperParameters()},
        }
    file = tmp_path / "best.ckpt"
    torch.save(content, file)
    with pytest.raises(UsageError, match="nothing of it was run") as err:
        read_checkpoint(file)
    assert ("a PyTorch Lightning checkpoint" in str(err.value)) is not whole
    assert err.value.fix is not None
    command = err.value.fix[err.value.fix.index('python -c "') :]
    code = command.removeprefix('python -c "').removesuffix('"')
    here = Path(__file__).parent
    bash = shutil.which("bash")  # as a user would paste it
    line = [bash, "-c", command.replace("python", sys.executable, 1)] if bash else []
    ran = subprocess.run(
        line or [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    got = read_checkpoint(tmp_path / "best.safetensors")
    torch.testing.assert_close(got["0.weight"], module[0].weight.detach())
