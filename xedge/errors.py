"""Every error xedge raises on purpose.

    XedgeError                  exit code
    ├── InternalError           1   a check of xedge's own failed; please report it
    ├── UsageError              2   bad input: a name, a file, a shape, a budget, a folder
    ├── LatencyMissed           3   measured, and over the latency budget
    ├── AccuracyMissed          4   measured, and below the accuracy floor
    ├── DeviceError             5   the device is absent or was lost
    ├── UnsupportedGraph        6   the target, or the tracer, cannot take this graph
    └── Inconclusive            7   the measurement is unstable or cannot decide

An error is one line: what happened, to which layer or file, and what to do about it.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path


class XedgeError(Exception):
    """Base of the tree. `str(error)` is one line: ``where: what; how to mend it``."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        if fix:
            line = f"{line}; {fix}"
        super().__init__(" ".join(filter(None, map(str.strip, line.replace("\t", " ").splitlines()))))


class InternalError(XedgeError):
    """A check of xedge's own failed."""

    exit_code = 1


class UsageError(XedgeError):
    """Bad input."""

    exit_code = 2


class LatencyMissed(XedgeError):
    """Measured, and over the latency budget."""

    exit_code = 3


class AccuracyMissed(XedgeError):
    """Measured, and below the accuracy floor."""

    exit_code = 4


class DeviceError(XedgeError):
    """The device is absent or was lost."""

    exit_code = 5


class UnsupportedGraph(XedgeError):
    """The target or the tracer cannot take this graph."""

    exit_code = 6


class Inconclusive(XedgeError):
    """The measurement is unstable or cannot decide."""

    exit_code = 7


def resume(folder: Path) -> str:
    """The command that goes on with a run, or makes anew what of it is gone."""
    return f"xedge compress --resume -o {shlex.quote(str(folder))}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the closest known ones, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"
