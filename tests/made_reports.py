"""Reports whose figures are inputs of tests, not claims: full, without labels, long, empty, hostile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xedge.report import Iteration, Latency, Layer, Report, Row, Subspace
from xedge.target import Artifact

NASTY = "<script>alert('1')</script>&\"|$x_1$ 卷積"


def latency(ms: float, ratio: tuple[float, float, float] | None = None, **more: Any) -> Latency:
    facts = {"runtime": "onnxruntime 1.20, 1 thread", "device": "local", "device_kind": "real", "processes": 11} | more
    return Latency(ms, 0.97 * ms, 1.04 * ms, ratio=ratio, **facts)


def report(depth: int = 5, targets: tuple[str, ...] = ("jetson", "android"), **changes: Any) -> Report:
    """A labelled, quantised, timed run whose figures are inputs of these tests, not claims."""
    rows = [
        row
        for i, target in enumerate(targets)
        for row in (
            Row("original", target, 0.9778, 1.0, 281_640, 61_706, 248_310, 229_000, 221_000, latency(0.0743)),
            Row(
                "compressed", target, 0.9722, 0.9861, 112_210, 18_232, 26_110, 15_200, 14_800,
                latency(0.0512, ((1.45, 1.41, 1.49), (1.01, 0.97, 1.04))[i % 2]), 31.2, 0.9972,
            ),
        )
    ]  # fmt: skip
    table = tuple(
        Layer(
            f"features.block{i}.depthwise_convolution_{i}", "conv", 64, 32 + i % 2, 3, 3, 10_000 + i, 5_000,
            4.5 - i % 3, {2: 3, 4: 10, 8: 1}, dict.fromkeys(targets, 8), 0.99 - 0.001 * i,
        )
        for i in range(depth)
    )  # fmt: skip
    rounds = tuple(
        Iteration(i, macs, macs / 281_640, 0.98 - 0.004 * i, 1 - 0.003 * i, 9.0 - i, 4.2, "uniform")
        for i, macs in enumerate((281_640, 200_000, 112_210))
    )
    made = Report(
        xedge="0.1.0", created="2025-11-22T10:31:19+00:00", request={"seed": 0, "bits": 4.5}, model="lenet5",
        data="digits", teacher="labels", environment={"python": "3.11", "cpu": {"cores": 2}}, rows=tuple(rows),
        layers=table, iterations=rounds, stopped_by="the MAC budget", price_of_alignment="3 % more MACs",
        certificate={"ok": True, "max_error": 1e-13, "moved": 0.2, "limit": 1e-9, "channels": 8, "reason": ""},
        artifacts=(Artifact("targets/a/model.onnx", "onnx", "jetson", "ab" * 32, 26_110, {"x": (1, 1, 8, 8)}, {}),),
        notes=("trained first",), planned_bits_mean=4.5, commands=(("repeat", "xedge compress --seed 0"),),
        subspaces=(Subspace("conv1", 64, 0.9, (0.6, 0.88, 0.93, 0.995)), Subspace("conv2", 32, 0.95, (0.91, 1.0))),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def unlabelled() -> Report:
    """No labels, no latency, no DI, no bits: what a first run on a folder of pictures gives."""
    full = report(targets=("jetson",))
    return dataclasses.replace(
        full,
        rows=tuple(dataclasses.replace(r, top1=None, latency=None, snr_db=None) for r in full.rows),
        layers=tuple(
            dataclasses.replace(x, di_kept=None, bits_mean=None, bits_histogram={}, executed_bits={})
            for x in full.layers
        ),
        iterations=tuple(dataclasses.replace(i, select_top1=None, di_total=None) for i in full.iterations),
        planned_bits_mean=None,
    )


EMPTY = report(
    rows=(), layers=(), iterations=(), notes=(), artifacts=(), certificate={}, commands=(), environment={}, subspaces=()
)

VARIANTS = {
    "full": report(),
    "unlabelled": unlabelled(),
    "110 layers": report(depth=110),
    "empty": EMPTY,
    "nasty": report(
        model=NASTY,
        data=NASTY,
        layers=tuple(dataclasses.replace(x, name=f"{NASTY}{i}", note=NASTY) for i, x in enumerate(report().layers)),
        notes=(NASTY,),
        request={NASTY: NASTY},
        commands=((NASTY, NASTY),),
        subspaces=(Subspace(NASTY, 3, 0.5, (1.0,)),),
        stopped_by=NASTY,
    ),
}
each_variant = pytest.mark.parametrize("made", VARIANTS.values(), ids=VARIANTS.keys())
