"""A stand-in for the Hugging Face hub on loopback, for tests that download.

It serves files from memory under the paths that ``huggingface_hub`` and ``datasets`` really ask
for. The libraries read ``HF_ENDPOINT`` when they are imported, so code under test runs in a
subprocess with ``environment()``.

    with HubStandIn(tmp_path) as hub:
        hub.add("models", "timm/resnet50.a1_in1k", {"model.safetensors": data})
        subprocess.run([...], env=hub.environment())
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import numpy as np

IMAGENET_COPY = "evanarlian/imagenet_1k_resized_256"
_RESOLVE = re.compile(
    r"/(?P<dataset>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)"
)
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")


class HubStandIn:
    """Serves repositories on 127.0.0.1 while the ``with`` block lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[tuple[str, str]] = set()
        self.requests: list[str] = []
        """Method, path and status of every request."""

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; later requests are refused, as with a hub that is gone."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str = "hf-home") -> dict[str, str]:
        """This process's environment with the stand-in for the hub and an empty cache."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "CSWAP_"))
        }
        proxies = {"http_proxy", "https_proxy", "all_proxy"}
        kept = {k: v for k, v in kept.items() if k.lower() not in proxies}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(self, kind: str, repository: str, files: Mapping[str, bytes]) -> None:
        """Serve files under ``models`` or ``datasets``."""
        self.repositories.setdefault((kind, repository), {}).update(files)

    def add_timm_weights(self, repository: str, architecture: str, *, seed: int = 0) -> str:
        """Serve random weights of a timm architecture, and return their digest."""
        import torch
        from safetensors.torch import save

        from cswap_deploy.models.load import weights_digest
        from cswap_deploy.models.torchvision_shim import import_timm

        torch.manual_seed(seed)
        module = import_timm().create_model(architecture, pretrained=False)
        config = {"architecture": architecture, "num_classes": module.num_classes}
        self.add(
            "models",
            repository,
            {
                "model.safetensors": save(module.state_dict()),
                "config.json": json.dumps(config).encode(),
            },
        )
        return weights_digest(module)

    def add_images(
        self,
        repository: str = IMAGENET_COPY,
        *,
        split: str = "val",
        labels: list[int],
        names: list[str] | None = None,
        size: tuple[int, int] = (80, 72),
        seed: int = 0,
    ) -> None:
        """Serve a parquet file of JPEG images, each with its label, as ``datasets`` writes them."""
        import pyarrow
        from PIL import Image
        from pyarrow import parquet

        rng = np.random.default_rng(seed)
        pictures = []
        for label in labels:
            coarse = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
            coarse[0, 0] = label % 256
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        plain = {"dtype": "int64", "_type": "Value"}
        label_type = {"names": names, "_type": "ClassLabel"} if names else plain
        features = {"image": {"_type": "Image"}, "label": label_type}
        image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        table = pyarrow.table(
            {"image": pyarrow.array(pictures, type=image), "label": labels},
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        file = io.BytesIO()
        parquet.write_table(table, file)
        self.add("datasets", repository, {f"data/{split}-00000-of-00001.parquet": file.getvalue()})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # one request a connection: none outlives the stand-in
    stand_in: HubStandIn

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        self.stand_in.requests.append(format % args)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if match := _API.fullmatch(path):
            self._api(match["kind"], match["repo"], match["rest"] or "", body)
        elif match := _RESOLVE.fullmatch(path):
            kind = "datasets" if match["dataset"] else "models"
            self._file(kind, match["repo"], match["file"])
        else:
            self._refuse("EntryNotFound", "no such page")

    def _repository(self, kind: str, name: str) -> dict[str, bytes] | None:
        if (kind, name) in self.stand_in.gated:
            self._refuse("GatedRepo", f"Access to {name} is restricted", status=401)
            return None
        files = self.stand_in.repositories.get((kind, name))
        if files is None:
            self._refuse("RepoNotFound", "Repository not found", status=401)
        return files

    def _api(self, kind: str, name: str, rest: str, body: bytes) -> None:
        files = self._repository(kind, name)
        if files is None:
            return
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": f} for f in files]
            self._json(
                {
                    "_id": "0" * 24,
                    "id": name,
                    "sha": _commit(files),
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z",
                }
            )
        elif rest.startswith("/tree/"):
            under = rest.removeprefix("/tree/").partition("/")[2]
            self._json(_tree(files, under))
        elif rest.startswith("/paths-info/"):
            asked = _asked_paths(body, self.headers.get("Content-Type", ""))
            known = {e["path"]: e for e in _tree(files, "")}
            self._json([known[p] for p in asked if p in known])
        else:
            self._refuse("EntryNotFound", f"the stand-in does not answer {rest}")

    def _file(self, kind: str, name: str, file: str) -> None:
        files = self._repository(kind, name)
        if files is None:
            return
        if file not in files:
            self._refuse("EntryNotFound", "Entry not found", commit=_commit(files))
            return
        data, status, extra = files[file], 200, {}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            extra["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(
            status,
            data,
            "application/octet-stream",
            {
                "ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"',
                "X-Repo-Commit": _commit(files),
                "Accept-Ranges": "bytes",
                **extra,
            },
        )

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _refuse(self, code: str, words: str, *, status: int = 404, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": words}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, json.dumps({"error": words}).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {
            **headers,
            "Content-Type": kind,
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _commit(files: Mapping[str, bytes]) -> str:
    return hashlib.sha1("\n".join(sorted(files)).encode()).hexdigest()


def _tree(files: Mapping[str, bytes], under: str) -> list[dict[str, Any]]:
    """Files and folders below a folder."""
    entries: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        if under and not path.startswith(f"{under}/"):
            continue
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder != under:
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
        oid = hashlib.sha1(data).hexdigest()
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    return list(entries.values())


def _asked_paths(body: bytes, kind: str) -> list[str]:
    if "json" in kind:
        paths = json.loads(body)["paths"]
        return [paths] if isinstance(paths, str) else list(paths)
    from urllib.parse import parse_qs

    return parse_qs(body.decode()).get("paths", [])
