"""The command ``cswap-deploy``: flags -> one library call -> rendering; ``doctor``; no logic."""

from __future__ import annotations

from cswap_deploy.cli.commands import app, main

__all__ = ["app", "main"]
