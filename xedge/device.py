"""Device: an address on the command line -> what to call it, how honest its numbers are, and its transport."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from xedge.errors import DeviceError, UsageError, nearest
from xedge.transports.base import Transport
from xedge.transports.local import Local

Kind = Literal["real", "emulated", "fake", "browser"]
"""``real`` silicon; ``emulated`` (qemu: right answers, meaningless times); ``fake`` (a test's); ``browser``."""

_WITH_ADDRESS = ("ssh", "adb")
_FORMS = ("local", "ssh://USER@HOST", "adb://SERIAL", "browser")


@dataclass(frozen=True)
class Device:
    """One device that is open: use as ``with open_device(address) as device``.

    Attributes:
        name: how reports call it; ``local`` is this host, which is never a figure for a board.
        kind: see Kind; a latency gate takes nothing but ``real``.
        target: the target whose artefacts it runs, or None where it runs those of several.
        transport: how files and commands reach it.
        address: as given to ``--device``.
        python: the command on the device that runs the agent.
    """

    name: str
    kind: Kind
    target: str | None
    transport: Transport
    address: str
    python: tuple[str, ...]

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.transport.close()


def open_device(address: str) -> Device:
    """The device at `address`. UsageError for a form xedge does not know, DeviceError for one it cannot reach yet."""
    scheme, separator, rest = address.partition("://")
    if address == "local":
        return Device("local", "real", None, Local(), address, (sys.executable,))
    if address == "browser" or (separator and scheme in _WITH_ADDRESS):
        if separator and not rest:
            raise UsageError("names no device", where=f"--device {address}", fix=f"write {scheme}://NAME")
        raise DeviceError(
            f"this version measures on this host only; the {scheme} transport is not in it",
            where=f"--device {address}",
            fix="use --device local, or copy the artefact and benchmarks/agent.py to the device and run it there",
        )
    raise UsageError("no such kind of device", where=f"--device {address}", fix=nearest(address, _FORMS))
