"""Which layers stay float under a latency budget: the minimum cut, made-up tables, and the whole of it on this host."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from flavours import quantised
from hypothesis import given, settings
from hypothesis import strategies as st

from xedge import candidates, latency, precision
from xedge.audit import audit_one
from xedge.candidates import MIXED
from xedge.export import write_flavour
from xedge.latency import NOTHING, Point
from xedge.load import load_target
from xedge.measure import QUICK
from xedge.onnx_graph import session
from xedge.pipeline import compress
from xedge.precision import Tensor, choose_floats, fastest, partly
from xedge.progress import Talk
from xedge.report import read_json
from xedge.request import Request

SHORT = dataclasses.replace(QUICK, min_runs=20, seconds=0.02, warmup_seconds=0.02)


def cost(units: list[tuple[float, float]], tensors: list[Tensor], floats: list[bool]) -> float:
    total = sum(real if f else integer for (integer, real), f in zip(units, floats, strict=True))
    for t in tensors:
        sides = [floats[t.writer], *(floats[r] for r in t.readers)]
        if all(sides):
            continue  # it stays float
        total += (t.to_integer if sides[0] else 0) + (t.to_float if any(sides[1:]) else 0)
    return total


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), branches=st.integers(0, 4))
def test_the_cut_is_the_best_of_all(seed: int, count: int, branches: int) -> None:
    """Along chains, and where tensors are read further on as well."""
    r = np.random.default_rng(seed)
    units: list[tuple[float, float]] = [(float(a), float(b)) for a, b in r.integers(0, 30, (count, 2))]
    if r.random() < 0.3:
        units[0] = (inf, 0.0)
    units.append((0.0, inf) if r.random() < 0.5 else (inf, 0.0))  # the ends
    readers: list[set[int]] = [{k + 1} for k in range(count)]
    for _ in range(branches):
        a, b = sorted(r.integers(0, count + 1, 2))
        if a < b:
            readers[a].add(int(b))
    tensors = [Tensor(k, tuple(by), *map(float, r.integers(0, 10, 2))) for k, by in enumerate(readers)]
    tensors.append(Tensor(count, (0,), *map(float, r.integers(0, 10, 2))))
    least = min(cost(units, tensors, list(f)) for f in product((False, True), repeat=count + 1))
    found = fastest(units, tensors)
    assert cost(units, tensors, found) == pytest.approx(least)


def test_a_run_of_float_layers_pays_its_borders_once() -> None:
    """Each layer gains 3 and its two borders cost 4: alone none pays, two together do. Else all are integer."""

    def chain(gain: float, *faster: int) -> list[bool]:
        units = [(10.0, 10.0 - gain if k in faster else 20.0) for k in range(4)]
        return fastest([*units, (0.0, inf)], [Tensor(k, (k + 1,), 2, 2) for k in range(4)] + [Tensor(4, (0,), 2, 2)])

    assert chain(3, 1) == [False] * 5
    assert chain(3, 1, 2) == [False, True, True, False, False]
    assert chain(3, 0, 2) == [False] * 5
    assert chain(2, 1, 2) == [False] * 5


Times = Callable[..., tuple[str, dict[str, Any], dict[Point, float]]]


def made_up(faster: str) -> Times:
    """A millisecond an integer unit and two a float one, but for `faster`; a tenth a conversion."""

    def times(_: object, __: object, points: Mapping[Point, object], ___: object) -> Any:
        ns = {NOTHING: 0.0}
        for key, *_____ in points:
            border = key.startswith("border ")
            ns[key] = 1e5 if border and key.split()[1] in ("x", "y") else 0.0 if border else 1e6
            if key.startswith("plain "):
                ns[key] = 2e5 if faster in key else 2e6
        return "made up", {}, {point: ns[point[0]] for point in [*points, (NOTHING, 0, 0)]}

    return times


@pytest.mark.parametrize("flavour", ["litert", "onnxruntime"])
def test_the_layers_that_float_wins_are_float_and_no_others(
    flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = quantised("residual")
    target = load_target({"litert": "android", "onnxruntime": "host-cpu"}[flavour])
    monkeypatch.setattr(precision, "timed_points", made_up("strides=[2, 2]) 1xCx8x8"))
    choice = choose_floats(q.proto, q.table, "local", target, print)
    strided = {"5.conv1", "5.downsample.0"}
    assert set(choice["layers"]) == strided, "both of the block that halves, beside each other"
    assert precision.words(choice)[0].endswith(" stays float: 0.2 ms against 1 ms in int8")
    mixed = partly(q.table, choice)
    # What they read and write is rounded for the integer neighbours; nothing else changes.
    assert mixed.activations == q.table.activations
    written = write_flavour(q.proto, mixed, target.flavour)
    onnx.save(written, tmp_path / "mixed.onnx")
    (tmp_path / "made").mkdir()
    path = target.compile(tmp_path / "mixed.onnx", tmp_path / "made", "model")
    audited = audit_one(path)
    if flavour == "onnxruntime":
        assert {a.name for a in audited.layers if not a.integer} == strided
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    ((exact,), (rounded,)) = (session(p, exact=True).run(None, {p.graph.input[0].name: x}) for p in (q.proto, written))
    assert np.abs(rounded - exact).max() < 0.2 * np.abs(exact).max()
    assert np.abs(target.load(path, 1)(x) - rounded).max() < 0.1 * np.abs(exact).max()


def test_between_float_layers_nothing_is_rounded_and_what_is_kept_float_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantised("residual")
    target = load_target("host-cpu")
    monkeypatch.setattr(precision, "timed_points", made_up(""))  # all is faster in float
    choice = choose_floats(q.proto, q.table, "local", target, print)
    assert set(choice["layers"]) == {w.layer for w in q.table.weights.values()}
    everything = partly(q.table, choice)
    assert (everything.weights, everything.activations) == ({}, {})
    assert partly(q.table, {"layers": {}, "tensors": []}) == q.table
    kept = candidates.without(q.table, q.proto, ("0",))
    monkeypatch.setattr(precision, "timed_points", made_up("nothing is"))
    assert choose_floats(q.proto, kept, "local", target, print)["layers"] == {}


def test_a_run_times_both_and_ships_what_the_whole_says(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this host, for real, but that one float unit is said to take no time, so that there is something to ship."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "PROCESSES", 1)
    monkeypatch.setattr(latency, "SWEEP", 4)
    monkeypatch.setattr("xedge.meter.QUICK", dataclasses.replace(QUICK, processes=2, retries=0))
    monkeypatch.setattr("xedge.meter.STANDARD", dataclasses.replace(QUICK, processes=5, retries=0))
    monkeypatch.setattr(candidates, "PROTOCOL", SHORT)
    real: dict[Point, float] = {}
    timed = precision.timed_points

    def times(*given: Any) -> Any:
        name, facts, ns = timed(*given)
        real.update(ns)
        flattering = {p: 0.0 if "plain dense" in p[0] and "1xCx4x4" in p[0] else t for p, t in ns.items()}
        borders = {p: 0.0 for p in ns if p[0].startswith("border ")}
        return name, facts, {**flattering, **borders}

    monkeypatch.setattr(precision, "timed_points", times)
    weights = tiny.train(tmp_path_factory.mktemp("weights") / "net.safetensors")
    request = Request(
        model=tiny.NET, weights=str(weights), data=tiny.DATA, targets=("host-cpu",), latency=1000.0, device="local",
        epochs=0, iterations=1, batch=32,
    )  # fmt: skip
    folder = compress(request, tmp_path / "run", Talk(quiet=True), bench=False).folder
    assert all(ns > 0 for ns in real.values())
    conversions = {p[0].split()[1] for p in real if p[0].startswith("border ")}
    assert {"x", "y"} <= conversions
    report = read_json(folder / "report.json")
    (choice,) = report.choices
    (form,) = [c for c in choice.candidates if c.form == MIXED]
    assert re.match(r"shipped; float are (first, )?second|rejected: ", form.words)  # first: by the clock
    said = [note for note in report.notes if " stays float: " in note]
    assert ("second" in [note.split()[0] for note in said]) == (choice.form == MIXED)
    monkeypatch.setattr(precision, "timed_points", None)  # it is sealed
    again = compress(request, folder, Talk(quiet=True), bench=False)
    assert {"candidates/host-cpu-precision.json", "candidates/host-cpu-precision.onnx"} <= set(again.skipped)
