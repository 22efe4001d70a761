"""Targets as the device that a latency is aimed at: real graphs, exported, built and timed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small_networks import small_cnn, small_vit
from torch import nn

from cswap_deploy.config import Config, PruneConfig, load_config
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.models.load import wrap_module
from cswap_deploy.pruning import timing
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.pruning.timing import latency_model, variants
from cswap_deploy.records.latency import LatencyTable, ProfileKit, TimedGraph
from cswap_deploy.records.store import Store
from cswap_deploy.runtime.cli import main as cswap_run
from cswap_deploy.targets.aim import TableAim, TargetAim, aim_at, write_kit

if TYPE_CHECKING:
    from conftest import Made, Ran

IMAGES = torch.randn(4, 3, 16, 16)
RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module", autouse=True)
def _few_variants() -> Iterator[None]:
    """Exporting each takes seconds."""
    before, timing.NARROWED = timing.NARROWED, 2
    yield
    timing.NARROWED = before


def wanted(**settings: Any) -> Config:
    given = {"model": "net", "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return load_config(**(given | {"threads": 1, "batch": "1:2:16"} | settings))


def aimed(module: nn.Module, runtime: str = "onnxruntime", **given: Any) -> TargetAim:
    config = wanted(target=(runtime,))
    spec = wrap_module(module, config.model).spec
    return TargetAim(runtime, config, spec, IMAGES[:2].numpy(), **given)


def prepared(module: nn.Module) -> Prepared:
    return prepare(module, IMAGES, PruneConfig(ratio_of="latency", round_to=1))


@cache
def timed(make: Callable[[], nn.Module], runtime: str) -> tuple[TimedGraph, ...]:
    """The dense network and two others, once."""
    return tuple(aimed(make(), runtime).timed(variants(prepared(make()))))


@pytest.mark.parametrize(
    ("make", "runtime"),
    [(small_cnn, "onnxruntime"), (small_vit, "onnxruntime"), (small_cnn, "openvino")],
)
def test_nodes_have_the_same_names_whatever_the_widths_and_say_whose_they_are(
    make: Callable[[], nn.Module], runtime: str
) -> None:
    pytest.importorskip(runtime)
    module = make()
    dense, *narrowed = timed(make, runtime)
    names = {node.name for node in dense.nodes}
    assert len(names) == len(dense.nodes)
    # What a runtime puts between nodes, named `before>what`, depends on widths and processors.
    own = {name for name in names if ">" not in name}
    for each in narrowed:
        assert len(own & {node.name for node in each.nodes}) >= 0.8 * len(own)
    layers = {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    owners = {name.partition("/")[0] for name in names}
    assert len(layers & owners) >= 0.9 * len(layers), "a fused one is its convolution"
    for each in (dense, *narrowed):
        assert each.ms > 0
        assert all(node.ms >= 0 and node.outputs for node in each.nodes)
        assert {len(node.outputs[0]) for node in each.nodes if node.op == "Conv"} <= {4}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_half_of_a_network_takes_less_than_all_of_it(runtime: str) -> None:
    pytest.importorskip(runtime)
    wide = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    module = nn.Sequential(wide, head).eval()
    aim = aimed(module, runtime)
    aim.start(module)
    short = nn.Sequential(wide[:2], head).eval()
    assert aim.fraction(short) < aim.fraction(module)


def test_what_was_timed_is_found_again(tmp_path: Path) -> None:
    module, store = small_cnn(), Store(tmp_path)
    dense = variants(prepared(module))[:1]
    first = aimed(module, store=store, network={"weights": "a"}).timed(dense)
    again = aimed(module, store=store, network={"weights": "a"}).timed(dense)
    assert again == first, "to the last digit: it was read"
    other = aimed(module, store=store, network={"weights": "b"}).timed(dense)
    assert other != first


def test_a_target_that_cannot_be_timed_is_refused_with_what_works() -> None:
    spec = aimed(small_cnn()).spec
    config = wanted(speedup=1.5, target=("tensorrt-rtx",))
    with pytest.raises(UsageError, match="tensorrt-rtx") as failed:
        aim_at(config, spec, lambda count: IMAGES[:count].numpy())
    assert failed.value.fix is not None
    for part in ("profile-kit", "cswap-run --profile", "--target onnxruntime --target tensorrt"):
        assert part in failed.value.fix
    assert aim_at(wanted(), spec, lambda count: IMAGES[:count].numpy()) is None


# --- a device that is elsewhere ------------------------------------------------------------------


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, config = small_cnn(), wanted()
    network = prepared(module)
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(network, wrap_module(module, config.model).spec, config, folder)
    return folder


def profiled(kit: Path, file: Path, *flags: str) -> LatencyTable:
    assert cswap_run([str(kit), "--profile", "-o", str(file), "--threads", "1", *flags]) == 0
    return LatencyTable.model_validate_json(file.read_bytes())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_kit_gives_the_table_that_a_build_would_make_here(
    kit: Path, runtime: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    table = profiled(kit, tmp_path / "device.json", "--target", runtime)
    network, here = prepared(small_cnn()), timed(small_cnn, runtime)
    assert [g.widths for g in table.graphs] == [g.widths for g in here]
    for there, own in zip(table.graphs, here, strict=True):
        nodes = [Counter((n.op, n.inputs, n.outputs) for n in each.nodes) for each in (there, own)]
        apart = (nodes[0] - nodes[1]) + (nodes[1] - nodes[0])
        if runtime == "openvino":  # counts whole microseconds: what never takes one may be missing
            slow = {(n.op, n.inputs, n.outputs) for n in (*there.nodes, *own.nodes) if n.ms > 0.002}
            assert apart.total() <= 2
            assert not slow & {*apart}
        else:
            assert not apart
            assert [n.name for n in there.nodes] == [n.name for n in own.nodes]
    assert (table.batch, table.threads) == (2, 1)
    assert table.runtime.startswith(runtime)
    model = latency_model(network, TableAim(tmp_path / "device.json", table))
    assert model.ms(table.graphs[0].widths) == pytest.approx(table.graphs[0].ms, rel=0.5)


def test_a_table_of_another_network_or_batch_is_refused(kit: Path, tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    table = profiled(kit, file)
    other = prepared(small_vit())
    with pytest.raises(ArtifactError, match="other groups") as failed:
        TableAim(file, table).timed(variants(other))
    assert "make the kit again" in str(failed.value.fix)
    spec = aimed(small_cnn()).spec
    config = wanted(speedup=1.5, latency_table=file, batch="1:1:16")
    with pytest.raises(UsageError, match="batch 2, this build is for 1"):
        aim_at(config, spec, lambda count: IMAGES[:count].numpy())
    found = aim_at(wanted(speedup=1.5, latency_table=file), spec, lambda n: IMAGES[:n].numpy())
    assert isinstance(found, TableAim)


def test_a_damaged_kit_is_refused(kit: Path, tmp_path: Path, capsys: Any) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(kit, copy)
    line = [str(copy), "--profile", "-o", str(tmp_path / "x.json")]
    (copy / "1.onnx").write_bytes(b"no graph")
    assert cswap_run(line) == 6
    told = json.loads((copy / "kit.json").read_text())
    told["graphs"][0]["file"] = "../0.onnx"
    for text in (json.dumps(told), json.dumps(told | {"graphs": 3}), "[" * 5000, '{"a": 1}'):
        (copy / "kit.json").write_text(text)
        assert cswap_run(line) == 6, text[:40]
    right = json.loads((kit / "kit.json").read_text())
    inside = [right["graphs"][0] | {"file": "a\0b"}]
    for beyond in ({"batch": 10**9}, {"batch": -1}, {"input_size": [1e999]}, {"graphs": inside}):
        (copy / "kit.json").write_text(json.dumps(right | beyond))
        assert cswap_run(line) == 6, beyond
    (copy / "kit.json").unlink()
    assert cswap_run(line) == 6
    assert "profile-kit" in capsys.readouterr().err
    assert cswap_run([str(kit), "--profile"]) == 2
    assert cswap_run([*line, "--target", "paper"]) == 2
    assert not (tmp_path / "x.json").exists()


def test_a_build_aims_at_a_device_that_is_elsewhere(
    made: Made, command: Callable[..., Ran], tmp_path: Path
) -> None:
    kit, file = tmp_path / "kit", tmp_path / "device.json"
    model = [made.settings["model"], "--round-to", "1"]
    shape = [f"--{n}={','.join(map(str, made.settings[n.replace('-', '_')]))}"
             for n in ("input-size", "mean", "std")]  # fmt: skip
    done = command("profile-kit", *model, *shape, "-o", kit, "--json")
    assert done.code == 0, done.err
    assert done.json()["graphs"] == len(ProfileKit.model_validate_json(
        (kit / "kit.json").read_bytes()).graphs)  # fmt: skip
    profiled(kit, file)
    done = command(
        "build", *made.flags, "--speedup", "1.1", "--latency-table", file,
        "--store", tmp_path / "store", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = done.json()
    assert told["ratio_of"] == "latency"
    assert any("was not measured there" in note for note in told["fallbacks"])
    useless = command("build", *made.flags, "--latency-table", file, "-o", tmp_path / "no")
    assert useless.code == 2
    assert "does nothing without" in useless.err
