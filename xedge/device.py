"""Device: an address or a device file on the command line -> its name, how honest its numbers are, its transport.

A device file is what a laboratory writes down about one board:

    address = "ssh://bench@orin-7"              # or adb://SERIAL, browser://HOST:PORT, or local
    name = "orin-7"                             # the file's name when absent
    target = "jetson-orin-nano"                 # it runs this target's artefacts only; absent: all it has a runtime for
    python = "/home/bench/venv/bin/python"      # a command there, or a list of words; python3 when absent
    cpus = [4, 5]                               # cores to pin to
    benchmark_model = "/data/local/tmp/benchmark_model"    # Google's program there, in place of Python, for .tflite
    trtexec = "/usr/src/tensorrt/bin/trtexec"   # NVIDIA's, likewise, for .onnx
    kind = "emulated"                           # real when absent; no latency gate takes an emulated device
    ssh_config = "ssh_config"                   # in place of ~/.ssh/config, beside this file
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from xedge.errors import DeviceError, UsageError, nearest
from xedge.transports.base import Transport

Kind = Literal["real", "emulated", "fake", "browser"]
"""``real`` silicon; ``emulated`` (qemu: right answers, meaningless times); ``fake`` (a test's); ``browser``."""

QUEUE = 3600.0
"""Seconds to wait for a device that another job holds."""

_FORMS = ("local", "ssh://USER@HOST", "adb://SERIAL", "browser", "FILE.toml")
_BROWSERS = ("browser", "browser+webgpu")


@dataclass(frozen=True)
class Description:
    """A device before it is opened: what a device file holds, or an address alone."""

    name: str
    address: str
    target: str | None = None
    python: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()
    kind: Kind = "real"
    ssh_config: Path | None = None
    benchmark_model: str | None = None
    trtexec: str | None = None

    @property
    def tools(self) -> dict[str, str]:
        """Programs that time in place of the agent -> where they lie on the device."""
        given = {"benchmark_model": self.benchmark_model, "trtexec": self.trtexec}
        return {name: path for name, path in given.items() if path is not None}


@dataclass(frozen=True)
class Device:
    """One device that is open: use as ``with open_device(address) as device``.

    Attributes:
        name: how reports call it; ``local`` is this host, which is never a figure for a board.
        kind: see Kind; a latency gate takes nothing but ``real``.
        target: the target whose artefacts it runs, or None where it runs those of several.
        transport: how files and commands reach it.
        address: as given to ``--device``.
        python: the command on the device that runs the agent; a browser needs none.
        cpus: cores to pin to; wherever the system puts it when empty.
        tools: programs that time in place of the agent -> where they lie there (see `xedge.tools`).
    """

    name: str
    kind: Kind
    target: str | None
    transport: Transport
    address: str
    python: tuple[str, ...]
    cpus: tuple[int, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.transport.close()


def describe(device: str) -> Description:
    """What `device`, an address or a device file, says. UsageError for a form xedge does not know."""
    if device.endswith(".toml"):
        return read_description(Path(device))
    scheme, separator, rest = device.partition("://")
    if separator and scheme in ("ssh", "adb") and not rest:
        raise UsageError("names no device", where=f"--device {device}", fix=f"write {scheme}://NAME")
    if scheme in _BROWSERS:
        return Description(device, device, kind="browser")
    if device == "local" or (separator and scheme in ("ssh", "adb")):
        return Description(device, device)
    raise UsageError("no such kind of device", where=f"--device {device}", fix=nearest(device, _FORMS))


def read_description(path: Path) -> Description:
    """A device file. UsageError where there is none, or it is not of that form."""
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("there is no such device file", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"cannot be read as TOML: {error}", where=str(path)) from error
    known = [f.name for f in fields(Description)]
    for key in given:
        if key not in known:
            raise UsageError(f"has an unknown key {key}", where=str(path), fix=nearest(key, known))

    def item(key: str, kinds: type | tuple[type, ...], form: str, default: Any) -> Any:
        value = given.get(key, default)
        if key in given and (not isinstance(value, kinds) or value in ("", [])):
            raise UsageError(f"{key} is {value!r}", where=str(path), fix=f"write {key} = {form}")
        return value

    address = item("address", str, '"ssh://USER@HOST"', None)
    if address is None:
        raise UsageError("has no address", where=str(path), fix='write address = "ssh://USER@HOST"')
    if describe(address).address.endswith(".toml"):
        raise UsageError(f"address is {address!r}, another file", where=str(path), fix="write its address here")
    python = item("python", (str, list), '"/path/to/python"', [])
    words = [python] if isinstance(python, str) else python
    cpus = item("cpus", list, "[0, 1]", [])
    if not all(type(core) is int and core >= 0 for core in cpus) or not all(isinstance(w, str) for w in words):
        raise UsageError("cpus wants numbers, python wants words", where=str(path))
    usual = describe(address).kind
    kind = item("kind", str, f'"{usual}"', usual)
    if usual == "browser" and kind == "real":
        raise UsageError("kind is 'real', and a browser's times are its own", where=str(path), fix="leave kind out")
    if kind not in get_args(Kind):
        raise UsageError(f"kind is {kind!r}", where=str(path), fix=nearest(kind, get_args(Kind)))
    config = item("ssh_config", str, '"ssh_config"', None)
    return Description(
        name=item("name", str, '"NAME"', path.stem),
        address=address,
        target=item("target", str, '"jetson-orin-nano"', None),
        python=tuple(words),
        cpus=tuple(cpus),
        kind=kind,
        ssh_config=path.parent / config if config else None,
        benchmark_model=item("benchmark_model", str, '"/data/local/tmp/benchmark_model"', None),
        trtexec=item("trtexec", str, '"/usr/src/tensorrt/bin/trtexec"', None),
    )


def open_device(device: str, wait: float | None = QUEUE, say: Callable[[str], None] = lambda line: None) -> Device:
    """The device, held until it is closed: other jobs of xedge queue meanwhile.

    Args:
        device: an address or a device file.
        wait: seconds to queue for it; None looks without holding it.
        say: called with a line while another job holds it.

    Raises:
        UsageError: a form xedge does not know.
        DeviceError: it cannot be reached, or is still in use after `wait` seconds.
    """
    about = describe(device)
    transport, python = _connect(about, wait, say)
    try:
        # An emulator gives itself away, whatever the device file says.
        kind: Kind = "emulated" if "emulator" in transport.facts() else about.kind
    except BaseException:
        transport.close()
        raise
    return Device(about.name, kind, about.target, transport, about.address, python, about.cpus, about.tools)


@dataclass(frozen=True)
class Seen:
    """One line of ``xedge devices``: `facts` of a device that is there, `error` of one that is not."""

    name: str
    kind: Kind
    address: str
    facts: dict[str, str]
    error: str | None


def at_hand() -> list[str]:
    """This host, the device files in the folder `devices`, and the phones that adb knows and no file has.

    Files of browsers are left out: somebody has to open a link for each.
    """
    from xedge.transports.adb import attached

    found = {str(file): read_description(file).address for file in sorted(Path("devices").glob("*.toml"))}
    files = [file for file, address in found.items() if address.partition("://")[0] not in _BROWSERS]
    return ["local", *files, *(a for a in (f"adb://{serial}" for serial in attached()) if a not in found.values())]


def look(device: str) -> Seen:
    """Reach a device without holding it: another job may go on there. Only a wrong address or file is raised."""
    about = describe(device)
    try:
        with open_device(device, wait=None) as opened:
            return Seen(opened.name, opened.kind, opened.address, opened.transport.facts(), None)
    except DeviceError as error:
        return Seen(about.name, about.kind, about.address, {}, str(error))


def _connect(about: Description, wait: float | None, say: Callable[[str], None]) -> tuple[Transport, tuple[str, ...]]:
    if about.address == "local":
        from xedge.transports.local import open_local

        python = about.python or (sys.executable,)
        return open_local(python, wait, say), python
    python = about.python or ("python3",)
    if about.address.startswith("ssh://"):
        from xedge.transports.ssh import open_ssh, parse

        return open_ssh(parse(about.address, about.ssh_config), python, wait, say), python
    if about.address.startswith("adb://"):
        from xedge.transports.adb import Adb

        return Adb(about.address.removeprefix("adb://"), wait, say, python=python), python
    from xedge.transports.browser import Browser
    from xedge.transports.browser import parse as parse_browser

    return Browser(parse_browser(about.address)), ()
