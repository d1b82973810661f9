"""Processes and records with the times that a test wants, and a device whose agent says them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xedge.device import Device
from xedge.measure import Protocol
from xedge.measurement import Measurement, Process
from xedge.transports.base import Completed
from xedge.transports.supervised import sha256

FAST = Protocol("test", "", 7, 20, 0.0, 0.0, 5.0, 2, 0.0)


def process(
    ms: float = 1.0, runs: int = 100, *, probe: float = 1e5, probe_after: float | None = None, **more: Any
) -> Process:
    """A process of `runs` equal runs; `probe` and `probe_after` are the probes' nanoseconds."""
    facts = {"governors": ["performance"], "khz_limit": {"cpu0": 2000}, "throttle_events": 0, "cooling": {"zone": 0}}
    fields: dict[str, Any] = {
        "warmup_ns": (int(ms * 3e6), int(ms * 1e6)),
        "run_ns": (int(ms * 1e6),) * runs,
        "stride": 1,
        "steady": True,
        "probe_before_ns": (int(probe),) * 9,
        "probe_after_ns": (int(probe_after or probe),) * 9,
        "before": {**facts, "runtime_version": "1.2.3"},
        "after": facts,
    }
    return Process(**{**fields, **more})


def record(times: Sequence[float], **more: Any) -> Measurement:
    fields: dict[str, Any] = {
        "model": "net.onnx",
        "sha256": "0" * 64,
        "runtime": "onnxruntime",
        "threads": 1,
        "protocol": "standard",
        "device": "orin",
        "device_kind": "real",
        "processes": tuple(process(ms) for ms in times),
        "replaced": (),
        "verdict": "ok",
        "reason": "",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Measurement(**{**fields, **more})


def spoken(p: Process, digest: str) -> str:
    """What the agent prints for this process."""
    lines: list[dict[str, Any]] = [
        {"kind": "facts", "when": "before", **p.before, "model_sha256": digest},
        {"kind": "warmup", "ns": p.warmup_ns, "steady": p.steady},
        {"kind": "probe", "when": "before", "ns": p.probe_before_ns},
        {"kind": "runs", "ns": p.run_ns, "stride": p.stride},
        {"kind": "probe", "when": "after", "ns": p.probe_after_ns},
        {"kind": "facts", "when": "after", **p.after},
    ]
    return "".join(json.dumps(line) + "\n" for line in [*lines, {"kind": "end", "lines": len(lines)}])


class Scripted:
    """A device whose agent says what the test wants: `script(model's name, how many runs before) -> Process`."""

    def __init__(self, script: Callable[[str, int], Process]) -> None:
        self.script, self.order = script, list[str]()
        self.digests: dict[str, str] = {}

    def push(self, path: Path) -> str:
        self.digests[path.name] = sha256(path)
        return path.name

    def run(self, argv: Sequence[str], timeout: float) -> Completed:
        name = argv[argv.index("--model") + 1]
        said = spoken(self.script(name, len(self.order)), self.digests[name])
        self.order.append(name)
        return Completed(tuple(argv), 0, said, "")

    def pull(self, remote: str, path: Path) -> None:
        raise AssertionError("nothing to pull")

    def facts(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass


def scripted(script: Callable[[str, int], Process]) -> tuple[Device, Scripted]:
    transport = Scripted(script)
    return Device("fake", "fake", None, transport, "fake", ("python",)), transport
