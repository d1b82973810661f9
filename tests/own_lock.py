"""A fixture: every test of a file that imports it has this host's lock to itself."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XEDGE_LOCK", str(tmp_path / "lock"))
    return tmp_path / "lock"
