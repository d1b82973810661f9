"""Measured rows in a file of JSON lines: what is there is not measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Rows:
    """Lines of a file, each written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: list[dict[str, Any]] = (
            [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []
        )

    def has(self, **keys: Any) -> bool:
        """Whether a row has these values."""
        return any(all(row.get(k) == v for k, v in keys.items()) for row in self.done)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        print(json.dumps(row), flush=True)
        self.done.append(row)
        with self.path.open("a") as f:
            f.write(json.dumps(row) + "\n")
