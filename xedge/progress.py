"""What a long command says while it works: bars on a terminal, log lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


@dataclass
class Talk:
    """Progress on stderr, so that stdout stays for results."""

    quiet: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """One line, with the seconds since the start where there is no terminal."""
        if self.quiet:
            return
        if self.console.is_terminal:
            self.console.print(text, highlight=False, markup=False)
        else:
            print(f"[{time.monotonic() - self.started:7.1f}s] {text}", file=sys.stderr, flush=True)

    def bar(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Walk `items` under a bar; without a terminal a line at most every ten seconds."""
        if self.quiet:
            yield from items
        elif self.console.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self.console, transient=True) as progress:
                yield from progress.track(items, total=total, description=what)
        else:
            last = time.monotonic()
            for i, item in enumerate(items):
                yield item
                if time.monotonic() - last > 10:
                    last = time.monotonic()
                    self.say(f"  {what}: {i + 1}{f' of {total}' if total else ''}")
