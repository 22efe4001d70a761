"""``python -m cswap_deploy.cli``."""

from __future__ import annotations

from cswap_deploy.cli.main import main

main()
