"""The strict stand-ins for TensorRT are shared with the tests of the targets."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "targets"))
