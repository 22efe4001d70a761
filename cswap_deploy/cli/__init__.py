"""The command ``cswap-deploy``: flags -> one library call -> rendering; ``doctor``; no logic."""
