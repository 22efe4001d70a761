"""A few cases of each parser in every run, and structures that Hypothesis makes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cswap_deploy.config import load_config, sections
from cswap_deploy.data.labels import read_class_map
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec, Preprocessing
from fuzz.cases import run_here, spoilt
from fuzz.parsers import PARSERS

CASES = 60
bounded = settings(
    max_examples=80, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["a\0", "x" * 300, 10**400, -(10**4000), "9" * 5000, "1e999", "nan", "²"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip
SETTINGS = sorted(name for kind in sections().values() for name in kind.model_fields)
SPEC = ModelSpec(
    name="net", source="factory", weights="random", weights_sha256="0" * 64, num_classes=4,
    preprocessing=Preprocessing(
        input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, resize_shorter=16
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
def test_a_few_spoilt_files_of_every_kind(name: str) -> None:
    """A crash of a decoder ends the run: the nightly one tells which case it was."""
    wrong = {case: found for case, found in run_here(name, range(CASES)) if found}
    assert not wrong


@pytest.mark.parametrize("name", PARSERS)
def test_the_files_that_are_spoilt_are_right_to_begin_with(name: str, tmp_path: Path) -> None:
    parser = PARSERS[name]
    read, seeds = parser.reader(), parser.seeds()
    for seed in seeds:
        path = tmp_path / parser.file
        path.write_bytes(seed)
        read(path)
    assert spoilt(parser, seeds, name, 7) == spoilt(parser, seeds, name, 7)


@bounded
@given(st.dictionaries(st.sampled_from(SETTINGS), odd, max_size=4))
def test_settings_are_taken_or_refused(given_settings: dict[str, Any]) -> None:
    said = ""
    try:
        config = load_config(**({"model": "demo-resnet"} | given_settings))
        plain = json.dumps(config.settings(), allow_nan=False)
        assert load_config(**json.loads(plain)) == config
    except UsageError as err:
        said = str(err)
    assert not said or said.startswith("bad settings")
    assert len(said) < 20_000


@bounded
@given(st.dictionaries(st.text(max_size=9), odd, max_size=4))
def test_class_maps_are_taken_or_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    file = tmp_path / "classes.json"
    try:
        file.write_text(json.dumps(document), "utf-8", "surrogatepass")
    except ValueError:  # of thousands of digits
        return
    found = {}
    with suppress(UsageError):
        found = read_class_map(file, SPEC)
    assert all(type(index) is int and 0 <= index < 4 for index in found.values())
