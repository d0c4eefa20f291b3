"""The tour, as a newcomer runs it: what it prints must be true and worth printing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import adapterhub_lite as ah


def test_the_demo_shows_that_merging_keeps_both_skills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "adapterhub_lite.cli", "demo", "-q", "-o", tmp_path / "out"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = {line[:13].strip(): line[13:].split() for line in done.stdout.splitlines()[1:]}
    bits = {name: (float(cells[0]), float(cells[1])) for name, cells in rows.items()}
    assert set(bits) == {"base alone", "prose", "tables", "merged", "merged-rank8"}
    for skill, name in enumerate(("prose", "tables")):
        assert bits[name][skill] < bits["base alone"][skill] - 0.3  # it learned something
        assert bits["merged"][skill] < bits["base alone"][skill] - 0.1  # and the merged one kept some of both
        assert bits["merged-rank8"][skill] < bits["base alone"][skill] - 0.1
    merged = ah.load(tmp_path / "out" / "merged")
    assert {merged.delta(site).rank for site in merged.sites} == {16}
