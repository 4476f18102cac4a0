"""What the synthetic rows are called; without TensorFlow, which makes them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

VERSION = 2  # Raised by any change of `generator.py` or `synthetic.py` that changes rows.


def fingerprint(version: int, settings: dict[str, Any]) -> str:
    """SHA-256 of the settings and the generator's version, in hexadecimal."""
    settings = {"source": "synthetic", "generator": version} | settings
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def feature_names(num_features: int) -> tuple[str, ...]:
    """`x`, or `x0`, `x1`, ... where there are several."""
    return ("x",) if num_features == 1 else tuple(f"x{j}" for j in range(num_features))
