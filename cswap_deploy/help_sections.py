"""``--help`` of the commands with many flags, in sections."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

SECTIONS: dict[str, tuple[str, ...]] = {
    "Arguments": ("model", "folder"),
    "Options": ("ratio", "ratio_of", "data", "target", "precision", "output", "budget"),
    "Network and images": (
        "checkpoint", "pretrained", "input_size", "mean", "std", "validation_data",
        "calibration_samples", "validation_samples", "allow_overlap", "class_map",
    ),
    "Pruning": (
        "method", "criterion", "rounds", "round_to", "effect", "intervention", "mix", "select",
        "refit", "refit_producers", "alpha",
    ),
    "Measuring effects": (
        "measuring", "scoring_samples", "error_rate", "memory_budget", "scoring_device", "workers",
    ),
    "Number formats": (
        "precision_drop", "keep_fp32", "int8_calibration", "int8_quantizer", "opset",
    ),
    "Engines": (
        "batch", "workspace_mib", "optimization_level", "hardware_compat", "version_compatible",
        "compute_capability", "strip_weights", "refit_engine", "check_ops",
    ),
    "Checks": ("latency_batch", "latency_runs", "threads", "parity_tolerance"),
    "Running": ("config", "store", "resume", "seed", "dry_run", "as_json", "quiet", "help"),
}  # fmt: skip
"""Title -> parameters of the command's function."""


class Sectioned(TyperCommand):
    """A command whose help has :data:`SECTIONS`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write them; a parameter that no section names would be missing, which a test forbids."""
        records = {str(p.name): p.get_help_record(ctx) for p in self.get_params(ctx)}
        for title, names in SECTIONS.items():
            rows = [record for name in names if (record := records.get(name)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
