"""Sweeps: one pruning whose rounds are results, a bundle for each, and all timed together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cswap_deploy
from cswap_deploy.config import load_config
from cswap_deploy.errors import GateError, PruneError, UsageError
from cswap_deploy.records.sweep import Sweep, SweepPoint
from cswap_deploy.sweep import Condition, conditions, pick, sweep

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]


def swept(made: Made, store: Path, output: Path, **given: Any) -> tuple[Path, Sweep]:
    settings = made.settings | {"store": store, "output": output, "rounds": 2}
    return sweep(load_config(**settings), **given)


@pytest.fixture(scope="module")
def two(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep, Path]:
    folder = tmp_path_factory.mktemp("sweep")
    return *swept(made, folder / "store", folder / "out", ratios=[0.4, 0.2]), folder / "store"


def test_each_point_is_a_bundle_that_has_what_was_asked(two: tuple[Path, Sweep, Path]) -> None:
    path, found, _ = two
    assert [p.label for p in found.points] == ["dense", "0.2", "0.4"]
    for point in found.points[1:]:
        bundle = cswap_deploy.load(path / point.bundle)
        assert bundle.manifest.ratio_effective["params"] == pytest.approx(
            float(point.label), abs=0.02
        )
        assert bundle.manifest.pruned.params == point.params
        assert bundle.manifest.targets[0].accuracy == point.change
        page = (path / point.bundle / "report.html").read_text()
        assert f"This bundle is the point {point.label} of a sweep" in page
        assert page.index("Accuracy against latency</h2>") < page.index("Accuracy</h2>")
    assert found.points[0].params > found.points[1].params > found.points[2].params


def test_all_are_timed_in_one_loop(two: tuple[Path, Sweep, Path]) -> None:
    for point in two[1].points:
        assert point.latency is not None
        assert point.latency.settings["interleaved"] == ["dense", "0.2", "0.4"]
        assert point.speedup is not None
        assert point.speedup_low is not None
        assert point.speedup_high is not None
        assert point.speedup_low <= point.speedup <= point.speedup_high
    assert two[1].points[0].speedup == 1.0


def test_a_point_goes_on_from_the_last_round_of_the_one_before(
    two: tuple[Path, Sweep, Path],
) -> None:
    path, _, store = two
    first, second = (cswap_deploy.load(path / name).plan for name in ("0.2", "0.4"))
    assert second.rounds[: len(first.rounds)] == first.rounds, "to the second of the clock"
    assert len(second.rounds) == 2, "as many as the deepest build by itself"
    gone = [
        ({*range(a.units)} - {*a.kept}, {*range(b.units)} - {*b.kept})
        for a, b in zip(first.groups, second.groups, strict=True)
    ]
    if not (second.rounds[-1].candidate or "").endswith("from dense"):
        assert all(before <= after for before, after in gone)
    assert not list(store.rglob("masked.safetensors")), "no round is kept once all is done"


def test_table_and_picture_say_the_same(two: tuple[Path, Sweep, Path]) -> None:
    path, found, _ = two
    page, text = ((path / name).read_text() for name in ("sweep.html", "sweep.md"))
    assert "<svg" in page
    for point in found.points:
        for written in (page, text):
            assert point.label in written
            assert f"{point.params:,}" in written
    assert Sweep.model_validate_json((path / "sweep.json").read_bytes()) == found


def test_a_sweep_replaces_its_own_folder_and_reuses_its_points(
    two: tuple[Path, Sweep, Path], made: Made
) -> None:
    path, found, store = two
    again = swept(made, store, path, ratios=[0.2, 0.4], picked_by="agreement>=0%,top1>=0")[1]
    plans = [cswap_deploy.load(path / p.bundle) for p in again.points if p.bundle]
    assert [p.manifest.stages["prune"] for p in plans] == ["reused"]
    assert again.picked in ("0.2", "0.4")
    assert [p.label for p in again.points if p.bundle] == [again.picked]
    assert [p.params for p in again.points] == [p.params for p in found.points]


def test_no_point_meets_the_condition(made: Made, two: tuple[Path, Sweep, Path]) -> None:
    path, _, store = two
    with pytest.raises(GateError, match=r"0.2 has speedup .*x, 0.4 has speedup"):
        swept(made, store, path.parent / "none", ratios=[0.2, 0.4], picked_by="speedup>=50x")
    assert (path.parent / "none" / "sweep.html").is_file(), "the curve is there all the same"
    assert not (path.parent / "none" / "0.2").exists()


def test_what_cannot_be_reached_is_said_and_the_rest_is_kept(
    made: Made, store: Path, tmp_path: Path
) -> None:
    path, found = swept(made, store, tmp_path / "far", ratios=[0.00001, 0.2, 0.9999])
    assert [p.label for p in found.points] == ["dense", "0.2"]
    assert found.missed.keys() == {"1e-05", "0.9999"}, "what lies beyond one is tried all the same"
    assert "cannot be met" in found.missed["0.9999"]
    assert "0.9999 was not reached" in (path / "sweep.md").read_text()
    with pytest.raises(PruneError, match="cannot be met"):
        swept(made, store, tmp_path / "further", ratios=[0.9999])
    assert not (tmp_path / "further").exists()


def test_another_network_stands_beside_it(made: Made, store: Path, tmp_path: Path) -> None:
    other = "small_models:other"
    path, found = swept(made, store, tmp_path / "beside", ratios=[0.2], against=[other])
    dense, _, beside = found.points
    assert (beside.label, beside.kind) == (other, "other")
    assert beside.params == dense.params, "the same network with other weights"
    assert beside.latency is not None
    assert other in (path / "sweep.md").read_text()
    assert cswap_deploy.load(path / beside.bundle).manifest.ratio_requested == 0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("drop<=1%", (Condition("drop", "<=", 0.01),)),
        (" agreement >= .95 ", (Condition("agreement", ">=", 0.95),)),
        ("speedup>=1.5x,latency<=4ms",
         (Condition("speedup", ">=", 1.5), Condition("latency", "<=", 4.0))),
    ],
)  # fmt: skip
def test_conditions_are_read(text: str, read: tuple[Condition, ...]) -> None:
    assert conditions(text) == read


@pytest.mark.parametrize("text", ["drop", "drop<1%", "drop<=1ms", "size<=4", "drop<=1%,"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no condition"):
        conditions(text)


def test_the_fastest_that_meets_it_is_picked() -> None:
    def point(label: str, macs: int, speedup: float) -> SweepPoint:
        return SweepPoint(label=label, kind="pruned", params=1, macs=macs, speedup=speedup)

    points = [point("a", 30, 1.2), point("b", 20, 1.5), point("c", 10, 2.0)]
    assert pick(points, conditions("speedup<=1.6")).label == "b"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ((), "a sweep needs its points"),
        (("--speedups", "1.5", "--ratios", "0.2"), "a sweep needs its points"),
        (("--speedups", "0.9,1.5"), "speed-ups lie above 1: 0.9"),
        (("--ratios", "1.5"), "ratios lie between 0 and 1: 1.5"),
        (("--ratios", "a,b"), "numbers with commas"),
        (("--ratios", "0.2", "--pick", "smallest"), "is no condition"),
    ],
)
def test_a_mistyped_sweep(command: Command, line: tuple[str, ...], words: str) -> None:
    done = command("sweep", "demo-resnet", *line)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_the_command_prints_the_folder_and_json(
    made: Made, two: tuple[Path, Sweep, Path], command: Command, tmp_path: Path
) -> None:
    done = command(
        "sweep", *made.flags, "--ratios", "0.2,0.4",
        "--store", str(two[2]), "-o", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["sweep"] == str(tmp_path / "out")
    assert [p["label"] for p in told["points"]] == ["dense", "0.2", "0.4"]
