"""The scripts as modules, for tests that call their functions in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str) -> Any:
    """`scripts/NAME.py` as a new module, without `scripts/` or anything else of its own on the path."""
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inspect look for it there
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module
