"""The Dockerfiles, the farm, and the check that stands in for a Docker engine; no network."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "docker"
FILES = sorted(path for path in FOLDER.glob("Dockerfile.*") if path.suffix != ".dockerignore")
BUILDS = [path for path in FILES if path.suffix != ".jetson"]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def language() -> ModuleType:
    """docker/dockerfile.py; the folder is no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("dockerfile")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def steps(language: ModuleType, path: Path) -> list[Any]:
    return language.parse(path.read_text())


def last_stage(steps: list[Any]) -> list[Any]:
    return steps[max(at for at, step in enumerate(steps) if step.word == "FROM") :]


def pip_installs(steps: list[Any]) -> list[str]:
    """Each `pip install` with its arguments."""
    runs = " && ".join(step.text for step in steps if step.word == "RUN")
    return [one for one in re.split(r"\s*&&\s*", runs) if re.search(r"\bpip install\b", one)]


def test_there_is_one_file_for_each_family_of_targets() -> None:
    assert [path.suffix for path in FILES] == [".cpu", ".jetson", ".tensorrt"]


@every_file
def test_bases_are_pinned_by_tag(steps: list[Any]) -> None:
    stages = [step.stage() for step in steps if step.word == "FROM"]
    names = {name for _, name in stages}
    for base, _ in stages:
        if base not in names:
            assert re.search(r":[\w.-]*\d[\w.-]*$", base), base
            assert not base.endswith(":latest")


@every_file
def test_the_user_is_set_last_and_is_not_root(steps: list[Any]) -> None:
    final = last_stage(steps)
    users = [at for at, step in enumerate(final) if step.word == "USER"]
    assert len(users) == 1
    # a number, for Kubernetes; no group, or Docker leaves out those of /etc/group
    assert re.fullmatch(r"[1-9]\d{3,}", final[users[0]].text)
    assert f"useradd --uid {final[users[0]].text}" in " ".join(step.text for step in final)
    assert not {"RUN", "COPY", "WORKDIR"} & {step.word for step in final[users[0] :]}


@every_file
def test_the_entry_point_is_a_command_of_the_package(path: Path, steps: list[Any]) -> None:
    (entry,) = (step.program() for step in last_stage(steps) if step.word == "ENTRYPOINT")
    assert entry == (["cswap-deploy"] if path in BUILDS else ["cswap-run"])
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    if entry == ["cswap-run"] and "cswap-run" not in scripts:
        pytest.skip("pyproject.toml has no cswap-run yet")
    assert entry[0] in scripts


@every_file
def test_pip_is_constrained_and_its_cache_stays_out(path: Path, steps: list[Any]) -> None:
    pins = "constraints.txt" if path in BUILDS else "docker/constraints-jetson.txt"
    installing = [step for step in steps if re.search(r"\bpip (install|wheel)\b", step.text)]
    for step in installing:
        caches = [mount["target"] for mount in step.mounts() if mount["type"] == "cache"]
        assert "/root/.cache/pip" in caches
    assert any(mount.get("source") == pins for step in installing for mount in step.mounts())
    installs = pip_installs(steps)
    assert installs
    for install in installs:
        assert re.search(r"-c /tmp/constraints.txt\b", install), install


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.name)
def test_torch_is_installed_with_what_needs_it(path: Path, steps: list[Any]) -> None:
    (install,) = pip_installs(steps)
    assert " torch " in install
    assert ".whl)[$EXTRAS]" in install


def test_the_jetson_gets_no_torch_and_nothing_that_pruning_needs(language: ModuleType) -> None:
    installs = pip_installs(language.parse((FOLDER / "Dockerfile.jetson").read_text()))
    assert [words.split()[-3:] for words in installs] == [
        ["numpy", "pillow", "pycuda"],
        ["--no-deps", "--ignore-requires-python", "/dist/*.whl"],
    ]
    for line in (FOLDER / "constraints-jetson.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w-]+==[\d.]+", line), line


@every_file
def test_onnxruntime_sends_nothing(steps: list[Any]) -> None:
    said = " ".join(step.text for step in last_stage(steps) if step.word == "ENV")
    assert "ORT_DISABLE_TELEMETRY=1" in said


def test_pycuda_finds_the_toolkit(language: ModuleType) -> None:
    for name in ("Dockerfile.tensorrt", "Dockerfile.jetson"):
        said = [s.text for s in language.parse((FOLDER / name).read_text()) if s.word == "ENV"]
        assert any(
            "CUDA_ROOT=/usr/local/cuda " in text and "PATH=/usr/local/cuda/bin:" in text
            for text in said
        )


@every_file
def test_packages_lists_stay_out_of_the_image(steps: list[Any]) -> None:
    for step in last_stage(steps):
        if "apt-get install" in step.text:
            assert step.text.endswith("rm -rf /var/lib/apt/lists/*")
            assert "--no-install-recommends" in step.text


@every_file
def test_the_context_has_what_is_copied_and_little_else(path: Path, steps: list[Any]) -> None:
    ignore = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    wanted = {mount["source"] for step in steps for mount in step.mounts()
              if mount["type"] == "bind" and "from" not in mount}  # fmt: skip
    for step in steps:
        if step.word == "COPY" and "from" not in step.options():
            wanted |= set(step.text.split()[:-1])
    assert wanted == allowed
    assert all((REPOSITORY / name).exists() for name in wanted)
    assert any(fnmatch("cswap_deploy/__pycache__", rule) for rule in rules[1:])


def test_no_machine_of_ours_is_named() -> None:
    public = {"download.pytorch.org"}
    for path in FOLDER.iterdir():
        if path.is_file():
            hosts = set(re.findall(r"https?://([^/\s\"']+)", path.read_text()))
            assert hosts <= public, path.name
            assert "file:///" not in path.read_text(), path.name


def test_the_readme_names_every_base(language: ModuleType) -> None:
    readme = (FOLDER / "README.md").read_text()
    for path in FILES:
        stages = [s.stage()[0] for s in language.parse(path.read_text()) if s.word == "FROM"]
        last = stages[-1] if ":" in stages[-1] else stages[0]
        assert f"| `{path.name}` | `{last}` |" in readme


@pytest.fixture(scope="module")
def farm() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_the_farm_is_built_from_a_file_that_is_there(farm: dict[str, Any]) -> None:
    assert set(farm["services"]) == {"head", "worker", "build"}
    for service in farm["services"].values():
        context = (FOLDER / service["build"]["context"]).resolve()
        assert context == REPOSITORY
        assert context / service["build"]["dockerfile"] in BUILDS
        assert "ray" in service["build"]["args"]["EXTRAS"].split(",")
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert (
            ":?" in service["environment"]["RAY_AUTH_TOKEN"]
        )  # no default: everyone would know it
        assert "ports" not in service
        assert set(service.get("depends_on", {})) <= set(farm["services"])
        volumes = [one.partition(":")[0] for one in service.get("volumes", [])]
        assert set(volumes) <= set(farm["volumes"])


def test_the_farm_builds_with_arguments_that_the_command_takes(farm: dict[str, Any]) -> None:
    from typer.main import get_command

    from cswap_deploy.cli.commands import command_line

    name, *arguments = farm["services"]["build"]["command"]
    command = get_command(command_line()).commands[name]  # type: ignore[attr-defined]
    read = command.make_context(name, arguments).params
    assert (read["model"], read["ratio"]) == ("demo-resnet", "0.4")
    assert str(read["output"]).startswith("/bundles/")
    port = read["workers"].removeprefix("ray://head:")
    assert f"--ray-client-server-port={port}" in farm["services"]["head"]["command"]


def test_comments_and_continuation_lines(language: ModuleType) -> None:
    read = language.parse(
        "# syntax=docker/dockerfile:1\n"
        "\n"
        "from debian:bookworm-slim as one\n"
        "RUN --mount=type=cache,target=/c --mount=type=bind,from=one,source=/s,target=/t \\\n"
        "    a \\\n"
        "    # why\n"
        "\n"
        "    && b # not a comment\n"
        'ENTRYPOINT ["a", "b c"]\n'
    )
    assert [(step.line, step.word) for step in read] == [(3, "FROM"), (4, "RUN"), (9, "ENTRYPOINT")]
    assert read[0].stage() == ("debian:bookworm-slim", "one")
    assert read[1].text.split() == ["a", "&&", "b", "#", "not", "a", "comment"]
    assert read[1].mounts() == [
        {"type": "cache", "target": "/c"},
        {"type": "bind", "from": "one", "source": "/s", "target": "/t"},
    ]
    assert read[2].program() == ["a", "b c"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FROM a\nRUN b \\\n", "line 2: the file ends within this instruction"),
        ("FROM a\nADD b c\n", "line 2: ADD is not understood"),
        ("FROM a\nRUN <<EOF\nb\nEOF\n", "line 2: heredocs are not understood"),
        ("FROM a\nUSER\n", "line 2: USER of nothing"),
        ("# escape=`\nFROM a\n", "line 1: the escape directive is not understood"),
        ("ARG A=1\n", "there is no FROM"),
    ],
)
def test_what_is_not_understood_is_an_error(language: ModuleType, text: str, words: str) -> None:
    with pytest.raises(language.DockerfileError, match=f"^{re.escape(words)}$"):
        language.parse(text)


def test_an_entry_point_in_shell_form_is_an_error(language: ModuleType) -> None:
    (_, step) = language.parse("FROM a\nENTRYPOINT cswap-deploy\n")
    with pytest.raises(language.DockerfileError, match=r'line 2: write ENTRYPOINT \["program"'):
        step.program()


def test_variables(language: ModuleType) -> None:
    values = {"A": "1", "EMPTY": ""}
    text = "$A ${A}2 ${NONE:-x} ${EMPTY:-y} ${A:+z} ${EMPTY:+no}|$NONE|"
    assert language.expand(text, values) == "1 12 x y z ||"


@pytest.fixture(scope="module")
def needs_mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Root, and overlayfs over the running system."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    here = tmp_path_factory.mktemp("overlay")
    for name in ("upper", "aside", "root"):
        (here / name).mkdir()
    options = f"lowerdir=/,upperdir={here}/upper,workdir={here}/aside"
    line = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, here / "root"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no overlayfs here: {done.stderr.strip()}")


def check(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """check.py on a small file, with the running system in place of Debian's image."""
    (folder / "Dockerfile").write_text(text)
    line = [sys.executable, FOLDER / "check.py", folder / "Dockerfile", "--context", folder]
    line += ["--root", "/", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("needs_mounts")
def test_a_step_that_fails_is_said_and_ends_with_1(tmp_path: Path) -> None:
    done = check(tmp_path, "FROM debian:bookworm-slim\nRUN echo alas \\\n  && false\nRUN true\n")
    assert done.returncode == 1
    rows = [" ".join(row.split()) for row in done.stdout.splitlines()]
    assert any(re.fullmatch(r"2 failed [\d.]+ s RUN echo alas && false", row) for row in rows)
    assert "alas" in rows
    assert any(re.fullmatch(r"4 not run [\d.]+ s RUN true", row) for row in rows)
    assert rows[-1] == "1 ran, 1 failed, 4 not run"


@pytest.mark.usefixtures("needs_mounts")
def test_steps_over_a_base_that_is_not_to_be_had_are_not_run(tmp_path: Path) -> None:
    done = check(tmp_path, "FROM nvcr.io/nvidia/tensorrt:26.08-py3\nRUN false\n")
    assert done.returncode == 0
    assert "needs the base nvcr.io/nvidia/tensorrt:26.08-py3" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 ran, 0 failed, 5 not run"


@pytest.mark.usefixtures("needs_mounts")
def test_an_image_is_built_in_stages_and_tried_as_its_user(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("from the context")
    marker = f"made-by-{os.getpid()}"
    done = check(
        tmp_path,
        "ARG SUITE=bookworm\n"
        "FROM debian:${SUITE}-slim AS one\n"
        "WORKDIR /made\n"
        "COPY words ./\n"
        f"RUN touch /{marker}\n"
        "FROM one\n"
        "ARG GREETING=hello\n"
        "COPY --from=one /made/words /copied\n"
        "RUN --mount=type=bind,source=words,target=/mounted --mount=type=cache,target=/kept \\\n"
        f"    test -f /{marker} && cmp /copied /mounted && test -d /kept \\\n"
        '    && echo "echo $GREETING \\$1 as \\$(id -u)" > /usr/local/bin/greet \\\n'
        "    && chmod +x /usr/local/bin/greet && rm -rf /root/.cache /var/lib/apt /var/cache/apt\n"
        "RUN test ! -e /mounted\n"
        "USER 10001\n"
        'ENTRYPOINT ["sh", "/usr/local/bin/greet"]\n',
        "--build-arg", "GREETING=welcome", "--try", "you",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "welcome --version as 10001" in done.stdout
    assert "welcome you as 10001" in done.stdout
    assert " 0 failed, 0 not run" in done.stdout.splitlines()[-1]
    assert not Path("/", marker).exists()


def test_a_file_that_is_not_understood_ends_with_2(tmp_path: Path) -> None:
    done = check(tmp_path, 'FROM debian:bookworm-slim\nSHELL ["bash"]\n')
    assert done.returncode == 2
    assert "line 2: SHELL is not understood" in done.stderr
