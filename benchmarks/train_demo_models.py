"""Train the two embedded demo networks on Fashion-MNIST and write their images.

    apt-get install dataset-fashion-mnist
    python benchmarks/train_demo_models.py                # both networks, then the images
    python benchmarks/train_demo_models.py --only demo-vit --epochs 80

The last 5,000 training images choose nothing but are reported beside the test accuracy, so that a
reader can see that no test image was used to pick a network: the last epoch's weights are kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cswap_deploy.models.demos import DEMOS, IMAGES, MEAN, STD, weights_file

SOURCE = Path("/usr/share/datasets/fashion-mnist")
RECIPES = {
    "demo-resnet": {"epochs": 14, "lr": 4e-3, "batch": 256, "weight_decay": 0.02, "smoothing": 0.0},
    "demo-vit": {"epochs": 30, "lr": 1e-3, "batch": 128, "weight_decay": 0.05, "smoothing": 0.05},
}


def read_idx(path: Path) -> np.ndarray:
    """One IDX file: images (N, 28, 28) or labels (N,), uint8."""
    raw = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def split(source: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    return (
        read_idx(source / f"{name}-images-idx3-ubyte.gz"),
        read_idx(source / f"{name}-labels-idx1-ubyte.gz").astype(np.int64),
    )


def normalise(images: np.ndarray) -> Tensor:
    """(N, 28, 28) uint8 -> (N, 1, 28, 28) float32."""
    return ((torch.from_numpy(images.copy()).float() / 255 - MEAN[0]) / STD[0]).unsqueeze(1)


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Mirror half, shift each by up to 2 pixels, erase a patch of a quarter of the images."""
    n = len(x)
    flip = torch.rand(n, generator=g) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    padded = F.pad(x, (2, 2, 2, 2), value=-MEAN[0] / STD[0])
    dy, dx = torch.randint(0, 5, (2, n), generator=g)
    rows = (torch.arange(28)[None] + dy[:, None])[:, None, :, None].expand(n, 1, 28, 32)
    x = padded.gather(2, rows)
    cols = (torch.arange(28)[None] + dx[:, None])[:, None, None, :].expand(n, 1, 28, 28)
    x = x.gather(3, cols)
    cy, cx = torch.randint(0, 28, (2, n), generator=g)
    near_y = (torch.arange(28)[None] - cy[:, None]).abs() < 5
    near_x = (torch.arange(28)[None] - cx[:, None]).abs() < 5
    hit = (
        near_y[:, :, None] & near_x[:, None, :] & (torch.rand(n, generator=g) < 0.25)[:, None, None]
    )
    return x.masked_fill(hit[:, None], 0.0)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return hits / len(y)


def train(name: str, source: Path, epochs: int, seed: int) -> dict[str, float]:
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    images, labels = split(source, "train")
    x, y = normalise(images[:55_000]), torch.from_numpy(labels[:55_000])
    held_x, held_y = normalise(images[55_000:]), torch.from_numpy(labels[55_000:])
    model = DEMOS[name]().to(memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    opt = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": recipe["weight_decay"]},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=recipe["lr"],
    )
    batch = int(recipe["batch"])
    steps = len(x) // batch
    total, warm = epochs * steps, 2 * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt,
        lambda i: min(
            i / warm, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, i - warm) / (total - warm)))
        ),
    )
    begun = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=g)
        running = 0.0
        for i in range(steps):
            pick = order[i * batch : (i + 1) * batch]
            xb = augment(x[pick], g).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(xb), y[pick], label_smoothing=recipe["smoothing"])
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
            running += loss.item()
        print(
            f"{name} epoch {epoch + 1}/{epochs} loss {running / steps:.4f} "
            f"held-out {accuracy(model, held_x, held_y):.4f} {time.perf_counter() - begun:.0f}s",
            flush=True,
        )
    test_images, test_labels = split(source, "t10k")
    result = {
        "held_out_top1": accuracy(model, held_x, held_y),
        "test_top1": accuracy(model, normalise(test_images), torch.from_numpy(test_labels)),
        "epochs": epochs,
        "seed": seed,
        "train_seconds": round(time.perf_counter() - begun),
    }
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    path = weights_file(name)
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, metadata={k: str(v) for k, v in result.items()})
    path.chmod(0o644)  # the library writes for the owner alone
    return result


def write_images(source: Path, count: int, seed: int) -> None:
    """Balanced samples: calibration from the training split, test from the test split."""
    for part, name in (("calibration", "train"), ("validation", "t10k")):
        images, labels = split(source, name)
        rng = np.random.default_rng(seed)
        pick = np.concatenate(
            [rng.choice(np.flatnonzero(labels == c), count // 10, replace=False) for c in range(10)]
        )
        rng.shuffle(pick)
        np.savez_compressed(IMAGES[part], images=images[pick][..., None], labels=labels[pick])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--only", choices=[*RECIPES, "images"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = {}
    for name in RECIPES:
        if args.only in (None, name):
            epochs = args.epochs or int(RECIPES[name]["epochs"])
            results[name] = train(name, args.source, epochs, args.seed)
    if args.only in (None, "images"):
        write_images(args.source, 2_000, args.seed)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
