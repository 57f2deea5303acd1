"""Tests. What they share: tiny.py (models), conftest.py (fixtures), and a helper per folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
