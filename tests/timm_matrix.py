"""The matrix: small networks of many timm families, each pruned, exported and checked.

They are a family's smallest, without most repetitions of a block where that is deep. Weights are
random and made lively; images are small: what is tested is that the result is right, not how good.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from apart import AbortedError, OutOfTimeError, RaisedError, apart
from built_right import Built, build, pictures
from random_weights import lively
from torch import nn

from cswap_deploy.models.timm_models import arguments, create, pretrained_cfg
from cswap_deploy.models.torchvision_shim import import_timm

Verdict = Literal["works", "parts whole", "refused", "WRONG", "TRACEBACK", "ABORT", "OUT OF TIME"]
BROKEN = ("WRONG", "TRACEBACK", "ABORT", "OUT OF TIME")
LIMIT_S = 300.0
"""Of processor time."""
RATIO = 0.2
WIDE = 12_000_000
"""Parameters from which a network is not refitted: that costs the cube of a layer's width."""
MOST_REFUSED = 6
REFUSED: dict[str, str] = {}
"""Name -> regular expression of the reason, where a refusal is right."""
COARSE = frozenset({"convnextv2_atto", "gmlp_ti16_224"})
"""Nothing but whole residual branches can leave: a ratio is met within half of one."""

_NAMES = """
    cait_xxs24_224 caformer_s18 coat_lite_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32
    convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_s cspnext_tiny
    davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla46_c dpn48b eca_botnext26ts_256
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050 gmlp_ti16_224
    halonet26t hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small inception_next_atto
    inception_v3 legacy_seresnet18 legacy_xception levit_128s mambaout_femto
    maxvit_pico_rw_256 mixer_s32_224 mobilenetv2_035 mobilenetv3_small_050
    mobilenetv4_conv_small_035 mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge
    nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 poolformerv2_s12 pvt_v2_b0
    rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s
    resmlp_12_224 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 sequencer2d_s shvit_s1
    skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn
    visformer_tiny vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
    vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p16_224
"""
_FAST = """
    convmixer_768_32 convnext_atto convnextv2_atto deit_tiny_distilled_patch16_224
    mobilenetv4_conv_small_035 regnetx_002 resmlp_12_224 resnet10t starnet_s050
    vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 xcit_nano_12_p16_224
"""
FAST = frozenset(_FAST.split())
"""In every run of the tests."""
_LONG = """
    caformer_s18 coat_lite_tiny coatnet_pico_rw_224 crossvit_tiny_240 davit_tiny dpn48b
    efficientformer_l1 focalnet_tiny_srf gcvit_xxtiny halonet26t hieradet_small hrnet_w18_small
    inception_v3 legacy_xception mambaout_femto maxvit_pico_rw_256 mvitv2_tiny nest_tiny
    nextvit_small rdnet_tiny sequencer2d_s shvit_s1 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small vitamin_small_224 volo_d1_224
    xception41p
"""
LONG = frozenset(_LONG.split())
"""Left out of the matrix unless asked for: what takes longest, of families beyond the sixtieth."""
_SIZES = {
    "crossvit_tiny_240": 240, "efficientformer_l1": 224, "halonet26t": 256, "inception_v3": 96,
}  # fmt: skip
"""Pixels where 64 are too few for the architecture."""
_FOUR, _SIX = (1, 1, 2, 1), (2, 2, 2, 2)
_SHALLOWER: dict[str, dict[str, Any]] = {
    "cait_xxs24_224": {"depth": 3, "depth_token_only": 1},
    "convit_tiny": {"depth": 3, "local_up_to_layer": 2},
    "convnext_atto": {"depths": _FOUR}, "convnextv2_atto": {"depths": _FOUR},
    "crossvit_tiny_240": {"depth": ((1, 2, 0), (1, 2, 0))},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "deit_tiny_distilled_patch16_224": {"depth": 3},
    "densenet121": {"block_config": (3, 3, 3, 3)},
    "eva02_tiny_patch14_224": {"depth": 3},
    "hiera_tiny_224": {"stages": _FOUR},
    "hieradet_small": {"stages": _FOUR, "global_att_blocks": (3,)},
    "inception_next_atto": {"depths": _FOUR},
    "mambaout_femto": {"depths": _FOUR},
    "nasnetalarge": {"num_features": 1056},  # 6 million parameters instead of 85
    "res2net50_14w_8s": {"layers": (2, 1, 1, 1)},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {"depths": _SIX}, "swinv2_cr_tiny_224": {"depths": _SIX},
    "swinv2_tiny_window8_256": {"depths": _SIX},
    "tnt_s_patch16_224": {"depth": 3},
    "twins_svt_small": {"depths": _SIX},
    "vgg11_bn": {"mlp_ratio": 0.05},  # 15 million parameters instead of 129
    "vit_relpos_small_patch16_224": {"depth": 3},
    "vit_tiny_patch16_224": {"depth": 3},
    "vit_tiny_r_s16_p8_224": {"depth": 3},
    "xcit_nano_12_p16_224": {"depth": 3},
}  # fmt: skip
"""Arguments that leave out repetitions of a block: time goes by the layer."""
_CUT = {
    "caformer_s18": r"stages\.\d\.blocks", "convmixer_768_32": "blocks",
    "focalnet_tiny_srf": r"layers\.\d\.blocks", "gmlp_ti16_224": "blocks",
    "mixer_s32_224": "blocks", "poolformerv2_s12": r"stages\.\d\.blocks",
    "resmlp_12_224": "blocks",
}  # fmt: skip
"""Where timm takes no such argument: which lists of blocks are cut to two."""


@dataclass(frozen=True, slots=True)
class Case:
    """One network of the matrix."""

    name: str
    pixels: int
    arguments: dict[str, Any]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        size = arguments(pretrained_cfg(self.name), (3, self.pixels, self.pixels))
        given = {"num_classes": 10} | size | self.arguments
        module = create(self.name, pretrained=False, arguments=given)
        for name, blocks in list(module.named_modules()) if self.name in _CUT else ():
            if re.fullmatch(_CUT[self.name], name):
                owner, _, last = name.rpartition(".")
                setattr(module.get_submodule(owner), last, blocks[:2])
        return module.eval()


CASES = {n: Case(n, _SIZES.get(n, 64), _SHALLOWER.get(n, {})) for n in _NAMES.split()}


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one network."""

    name: str
    family: str
    """timm's module."""
    verdict: Verdict
    seconds: float
    reason: str = ""
    """Of a refusal or a failure."""
    params: tuple[int, int] = (0, 0)
    """Before and after."""
    groups: int = 0
    excluded: dict[str, str] = field(default_factory=dict)


def family(name: str) -> str:
    """timm's module of a model."""
    entry = import_timm().models.model_entrypoint(name)
    return str(entry.__module__.rpartition(".")[2])


def attempt(name: str, folder: Path) -> Built:
    """Build one network in this process."""
    torch.set_num_threads(1)
    case = CASES[name]
    size = (3, case.pixels, case.pixels)
    weights = lively(case.make(), pictures(16, size, seed=3)[0]).state_dict()

    def make() -> nn.Module:
        module = case.make()
        module.load_state_dict(weights)
        return module

    return build(
        make, folder, ratio=RATIO, size=size, images=12, scoring_samples=2, round_to="auto",
        refit=sum(w.numel() for w in weights.values()) < WIDE, fresh=case.make,
    )  # fmt: skip


def row_of(name: str, folder: Path, *, limit_s: float = LIMIT_S) -> Row:
    """Build one network in a process of its own, and say what came of it."""
    begun = time.perf_counter()

    def row(verdict: Verdict, reason: str = "", **more: Any) -> Row:
        seconds = round(time.perf_counter() - begun, 1)
        return Row(name, family(name), verdict, seconds, reason, **more)

    try:
        built = apart(attempt, name, folder, limit_s=limit_s)
    except AssertionError as err:
        return row("WRONG", str(err))
    except AbortedError as err:
        return row("ABORT", str(err))
    except OutOfTimeError as err:
        return row("OUT OF TIME", str(err))
    except RaisedError as err:
        return row("TRACEBACK", str(err).strip().splitlines()[-1])
    if built.refused:
        return row("refused", built.reason)
    verdict: Verdict = "parts whole" if built.excluded else "works"
    return row(verdict, params=built.params, groups=built.groups, excluded=built.excluded)


def full_table(rows: Iterable[Row]) -> str:
    """Every network in a row of Markdown."""
    lines = [
        "| network | family | result | parameters | groups | whole | seconds |",
        "| --- | --- | --- | ---: | ---: | --- | ---: |",
    ]
    for r in rows:
        said = r.verdict + (f": {_line(r.reason)}" if r.reason else "")
        before, after = (f"{p:,}" for p in r.params)
        whole = "; ".join(f"{len(n)} {why}" for why, n in _by_reason(r.excluded).items())
        lines.append(
            f"| {r.name} | {r.family} | {said} | {before} -> {after} | {r.groups} | "
            f"{_line(whole)} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def short_table(rows: Iterable[Row]) -> str:
    """What works, what works with parts whole, what is refused and why: three rows of Markdown."""
    by: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        by[r.verdict].append(r)
    why: dict[str, set[str]] = defaultdict(set)
    for r in by["parts whole"]:
        for reason in r.excluded.values():
            why[kind_of(reason)].add(r.name)
    largest = sorted(why.items(), key=lambda item: (-len(item[1]), item[0]))
    whole = "; ".join(f"{reason}: {', '.join(sorted(names))}" for reason, names in largest)
    no = "; ".join(f"{r.name}: {_line(r.reason)}{_kinds_within(r.reason)}" for r in by["refused"])
    parts = (
        ("works", len(by["works"]), ", ".join(r.name for r in by["works"])),
        ("works, these parts whole", len(by["parts whole"]), whole),
        ("refused", len(by["refused"]), no),
    )
    lines = [f"| {said} | {count} | {names or '-'} |" for said, count, names in parts]
    return "\n".join(["| timm networks | | |", "| --- | ---: | --- |", *lines])


BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"


def table_within(text: str) -> str:
    """What stands between the markers of a page.

    Raises:
        ValueError: It has no markers.
    """
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def write_table(page: Path, rows: Iterable[Row]) -> None:
    """Put the short table between the markers of a page; the rest of it stays as it is."""
    text = page.read_text()
    at, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:at]}\n{short_table(rows)}\n{text[end:]}")


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    return [Row(**r | {"params": tuple(r["params"])}) for r in json.loads(path.read_text())]


def _by_reason(excluded: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in excluded.items():
        found[reason].append(name)
    return found


_SOME = re.compile(r"^\d+ of its \d+ units stay: ")
_NAME = re.compile(r"\b\w+(?:\.\w+)+")


def kind_of(reason: str) -> str:
    """A reason without the numbers and names of one network."""
    general = _SOME.sub("", _line(reason)).partition(": ")[0]
    return _NAME.sub("another layer", general)


def _kinds_within(reason: str) -> str:
    """What a refusal says of each group, in brackets."""
    each = re.findall(r"^ {4}[^:]+: (.+)$", reason, flags=re.MULTILINE)
    return f" ({', '.join(sorted({*map(kind_of, each)}))})" if each else ""


def _line(text: str) -> str:
    return text.partition("\n")[0].replace("|", "\\|")
