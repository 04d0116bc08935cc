"""Where the repository is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny-arithmetic"
SUPPORT = Path(__file__).parent
