"""pytest on devices: fixtures, a marker, and assertions that fail with an interval in their message.

    pytest --xedge-device devices/orin-7.toml --xedge-run run --xedge-require-device

    @pytest.mark.xedge_device("jetson-orin-nano")
    def test_latency(xedge_device, xedge_run):
        measurement = xedge_device.measure(xedge_run.artifact("jetson-orin-nano"))
        assert measurement.within(30)

Loaded by pytest wherever xedge is installed; nothing heavy is imported before a fixture is used.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xedge.device import Description, Device
    from xedge.measurement import Comparison, Measurement

_MARK = "xedge_device"
_OPENED = pytest.StashKey[dict[str, "Device | str"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xedge", "models on devices")
    group.addoption(
        "--xedge-device",
        action="append",
        default=[],
        metavar="DEVICE",
        help="local, ssh://USER@HOST or FILE.toml; repeat for several",
    )
    group.addoption(
        "--xedge-require-device", action="store_true", help="a test that finds no device fails instead of being skipped"
    )
    group.addoption("--xedge-run", metavar="RUN", help="the run folder that xedge_run opens")
    group.addoption("--xedge-protocol", metavar="NAME", default="standard", help="reference, standard or quick")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{_MARK}(name): the test needs the device of that name, or one for that target")
    config.stash[_OPENED] = {}


def pytest_unconfigure(config: pytest.Config) -> None:
    for device in config.stash.get(_OPENED, {}).values():
        if not isinstance(device, str):
            device.transport.close()


@dataclass(frozen=True)
class Timed:
    """A measurement as a test uses it: ``assert timed.within(30)``."""

    measurement: Measurement = field(repr=False)

    def within(self, budget_ms: float) -> Verdict:
        """Whether the median latency meets the budget. False, with the reason, also where that is not certain."""
        from xedge.measurement import gate

        m = self.measurement
        verdict, time = gate(m, budget_ms), m.interval
        words = f"{verdict} for {budget_ms:g} ms: {time.median:.4g} ms [{time.lower:.4g}, {time.upper:.4g}]"
        return Verdict(verdict == "pass", f"{words} {_taken(m)}, {len(m.processes)} processes{_because(m)}")


@dataclass(frozen=True)
class Compared:
    """A comparison as a test uses it: ``assert compared.faster_by(1.2)``."""

    comparison: Comparison = field(repr=False)

    def faster_by(self, factor: float) -> Verdict:
        """Whether the second model is at least so many times as fast as the first, by the interval's lower end."""
        c, ratio = self.comparison, self.comparison.ratio
        sure = c.verdict == "ok" and ratio.decisive and ratio.lower >= factor
        words = f"{'pass' if sure else 'not shown'} for a factor of {factor:g}: ratio {ratio.median:.3g}"
        words += f" [{ratio.lower:.3g}, {ratio.upper:.3g}] {_taken(c.b)}, {len(c.ratios)} pairs"
        return Verdict(sure, words + _because(c))


def _taken(m: Measurement) -> str:
    return f"on {m.device} ({m.device_kind}), {m.runtime} {m.runtime_version}"


def _because(record: Measurement | Comparison) -> str:
    return f"; {record.verdict}: {record.reason}" if record.reason else ""


@dataclass(frozen=True)
class Verdict:
    """True or false, and why: pytest shows `repr` where an assertion fails, up to 240 characters of it."""

    holds: bool
    words: str

    def __bool__(self) -> bool:
        return self.holds

    def __repr__(self) -> str:
        return self.words


@dataclass(frozen=True)
class OpenDevice:
    """What the fixture `xedge_device` gives. `device`: the open device, held until the session ends."""

    device: Device
    protocol: str

    def measure(self, model: Path, *, threads: int = 1) -> Timed:
        """Time one .onnx or .tflite file by the session's protocol."""
        from xedge.measure import measure, preset

        return Timed(measure(self.device, model, None, preset(self.protocol), threads=threads))

    def compare(self, a: Path, b: Path, *, threads: int = 1) -> Compared:
        """Time two files in interleaved pairs."""
        from xedge.measure import compare, preset

        return Compared(compare(self.device, a, b, preset(self.protocol), threads=threads))


@dataclass(frozen=True)
class OpenRun:
    """What the fixture `xedge_run` gives. `folder`: of a finished run."""

    folder: Path

    def artifact(self, target: str) -> Path:
        """The model file for a target."""
        from xedge.errors import UsageError
        from xedge.report import read_json

        made = {a.target: self.folder / a.path for a in read_json(self.folder / "report.json").artifacts}
        if target not in made:
            raise UsageError(f"has nothing for {target}, only for {', '.join(made)}", where=str(self.folder))
        return made[target]

    def original(self, target: str) -> Path:
        """The original in the same format."""
        return self.folder / f"original{self.artifact(target).suffix}"

    def drop_within(self, target: str, max_drop: float) -> Verdict:
        """Whether accuracy on validation data fell by no more than `max_drop`, a fraction, with its interval."""
        from xedge.gate import gate_run

        (check,) = [c for c in gate_run(self.folder, None, max_drop, None) if c.target == target]
        return Verdict(check.verdict == "pass", str(check))


def _is(about: Description, wanted: str | None) -> bool:
    """Whether the device is called so, or is for the target called so."""
    from xedge.errors import UsageError
    from xedge.load import load_target

    if wanted is None or wanted in (about.name, about.target):
        return True
    with contextlib.suppress(UsageError):  # a device's name that no target has
        return about.target is not None and load_target(wanted).name == load_target(about.target).name
    return False


def _find(config: pytest.Config, wanted: str | None) -> Device | str:
    """The first device given that is `wanted`, opened; or why there is none."""
    from xedge.device import describe, open_device
    from xedge.errors import DeviceError

    opened = config.stash[_OPENED]
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    for address in config.getoption("--xedge-device"):
        if _is(describe(address), wanted):
            if address not in opened:
                try:
                    opened[address] = open_device(address, say=terminal.write_line if terminal else print)
                except DeviceError as error:
                    opened[address] = f"needs {wanted or 'a device'}: {error}"
            return opened[address]
    return f"needs {f'the device {wanted}' if wanted else 'a device'}: give --xedge-device ADDRESS|FILE.toml"


@pytest.fixture
def xedge_device(request: pytest.FixtureRequest) -> OpenDevice:
    """The device that the marker names, or the first one given; opened once a session, and held until its end."""
    marker = request.node.get_closest_marker(_MARK)
    wanted = str(marker.args[0]) if marker and marker.args else None
    device = _find(request.config, wanted)
    if isinstance(device, str):
        if request.config.getoption("--xedge-require-device"):
            pytest.fail(f"--xedge-require-device, and {device}", pytrace=False)
        pytest.skip(device)
    return OpenDevice(device, request.config.getoption("--xedge-protocol"))


@pytest.fixture
def xedge_run(request: pytest.FixtureRequest) -> OpenRun:
    """The finished run of --xedge-run."""
    given = request.config.getoption("--xedge-run")
    if given is None:
        pytest.skip("needs a run: give --xedge-run RUN")
    from xedge.errors import UsageError
    from xedge.report import read_json

    folder = Path(given)
    try:
        read_json(folder / "report.json")
    except UsageError as error:
        pytest.fail(str(error), pytrace=False)
    return OpenRun(folder)
