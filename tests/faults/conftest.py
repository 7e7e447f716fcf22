"""Where the tests of this folder find the small models of others."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in ("train", "study", "tune", "export"):
    sys.path.append(str(Path(__file__).parents[1] / _folder))
