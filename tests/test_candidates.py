"""Never slower: which form a target ships, by real times on this host, and the words for those that lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from flavours import quantised
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from small_run import process

from xedge import candidates, measure
from xedge.assemble import _executed, _stored, _tflite_weights
from xedge.audit import audit_one
from xedge.candidates import Form
from xedge.export import write_flavour
from xedge.load import load_target
from xedge.measure import QUICK
from xedge.measurement import Comparison, Measurement, from_json
from xedge.pipeline import compress
from xedge.plan import Budget
from xedge.progress import Talk
from xedge.quantize import ScaleTable
from xedge.report import markdown, read_json
from xedge.request import Request

pytest_plugins = ["tiny_runs"]

SHORT = replace(QUICK, min_runs=20, seconds=0.1, warmup_seconds=0.02)


def net(path: Path, more: int) -> Path:
    """Four logits of a picture; `more` convolutions beside them cost time and change nothing."""
    draw = np.random.default_rng(0)
    held = [numpy_helper.from_array(draw.standard_normal(s).astype(np.float32), n) for n, s in (("w", (4, 1, 3, 3)),)]
    held.append(numpy_helper.from_array(draw.standard_normal((64, 64, 3, 3)).astype(np.float32) / 24, "heavy"))
    held.append(numpy_helper.from_array(draw.standard_normal((64, 1, 3, 3)).astype(np.float32), "wide"))
    held.append(numpy_helper.from_array(np.float32(0), "zero"))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Conv", ["x", "wide"], ["h0"], pads=[1] * 4),
        *(helper.make_node("Conv", [f"h{i}", "heavy"], [f"h{i + 1}"], pads=[1] * 4) for i in range(more)),
        helper.make_node("ReduceMean", [f"h{more}"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "zero"], ["n"]),
        helper.make_node("Add", ["f", "n"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 1, 8, 8]), ("y", [1, 4]))]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], held if more else [held[0], *held[2:]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def decided(folder: Path, made: list[Form], drop: float | None, weights: Path) -> Any:
    loaded = SimpleNamespace(data=tiny.data(), settings=SimpleNamespace(budget=Budget(max_drop=drop)))
    original = tiny.net()
    original.load_state_dict(load_file(weights))
    found = candidates.decide(
        loaded,
        load_target("host-cpu"),
        made,
        {},
        "local",
        original,
        folder,
        Talk(quiet=True),  # type: ignore[arg-type]
    )
    return found["choice"], [from_json(c) for c in found["comparisons"]]


def made(folder: Path, **work: int) -> list[Form]:
    empty = ScaleTable({}, {})
    return [Form(name, net(folder / f"{name}.onnx", n), "float", empty) for name, n in work.items()]


def test_the_fastest_is_shipped_and_the_plan_says_why_it_lost(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this host, for real: the plan's form does many times the work of its rival, and gives the same."""
    monkeypatch.setattr(candidates, "PROTOCOL", SHORT)
    monkeypatch.setattr(measure, "TOLERANCE", 9.0)  # other jobs may slow this host: not by the forty times asked about
    choice, (comparison,) = decided(tmp_path, made(tmp_path, int8=40, float32=1), None, weights)
    assert choice["form"] == "float32"
    assert choice["why"] == "float32 in place of int8: the fastest on local that holds the floor"
    shipped, rejected = choice["candidates"]
    assert (shipped["form"], shipped["words"]) == ("float32", "shipped")
    assert rejected["words"].startswith("rejected: ")
    assert " slower than float32 on local" in rejected["words"]
    assert comparison.finding == "faster"


def test_what_breaks_the_floor_is_not_even_timed(weights: Path, tmp_path: Path) -> None:
    """Random logits are right by chance: every form is below the floor, and the plan's is kept."""
    choice, comparisons = decided(tmp_path, made(tmp_path, int8=1, float32=0), 0.01, weights)
    assert (choice["form"], comparisons) == ("int8", [])
    assert choice["why"] == "int8 as planned: no form holds the floor"
    assert "below the floor of" in choice["candidates"][1]["words"]


def comparison(a: float, b: float, spread: float = 0.0) -> Comparison:
    """Nine pairs with medians of a and b ms; b's alternate around it by `spread`."""
    sides = []
    for middle, wide in ((a, 0.0), (b, spread)):
        processes = tuple(process(middle * (1 + wide * (-1) ** i)) for i in range(9))
        sides.append(
            Measurement("m", "0", "litert", 1, "standard", "pixel", "real", processes, (), "ok", "", "2026-01-01")
        )
    return Comparison(sides[0], sides[1], (), "ok", "")


def test_the_words_say_who_lost_by_how_much() -> None:
    slow = candidates.lost(comparison(1.07, 1.0), "int8", "float16", "orin")
    assert slow == ("int8", "rejected: 7 % [7, 7] slower than float16 on orin")
    slow = candidates.lost(comparison(1.0, 1.5), "int8", "float32", "orin")
    assert slow == ("float32", "rejected: 50 % [50, 50] slower than int8 on orin")
    loser, words = candidates.lost(comparison(1.0, 1.0, 0.1), "int8", "float32", "orin")
    assert loser == "float32", "without a proof the plan's stays"
    assert words.startswith("rejected: not measurably faster than int8 on orin, ratio ")
    disturbed = replace(comparison(1.5, 1.0), verdict="throttled", reason="hot")
    assert candidates.lost(disturbed, "int8", "float32", "orin")[0] == "float32"


def test_layers_that_the_audit_names_stay_float(tmp_path: Path) -> None:
    q = quantised("residual")
    onnx.save(q.flavour["onnxruntime"], tmp_path / "planned.onnx")
    names = candidates.exceptions(tmp_path / "planned.onnx", q.table)
    assert set(names) < {w.layer for w in q.table.weights.values()}
    assert names, "the stem reads three channels"
    partly = candidates.without(q.table, q.proto, names)
    onnx.save(write_flavour(q.proto, partly, "onnxruntime"), tmp_path / "partly.onnx")
    found = {layer.name: layer.integer for layer in audit_one(tmp_path / "partly.onnx").layers}
    assert {name for name, integer in found.items() if not integer} == set(names)


def test_without_a_device_that_can_decide_the_plan_is_shipped(tmp_path: Path) -> None:
    def why(target: str, device: str | None) -> str | None:
        return candidates.unmeasured(load_target(target), device)

    (tmp_path / "emulated.toml").write_text('address = "local"\nkind = "emulated"\n')
    (tmp_path / "phone.toml").write_text('address = "local"\ntarget = "pixel8"\n')
    assert why("host-cpu", None) == "no --device was given"
    assert why("host-cpu", "local") is None
    assert why("android", "adb://1") is None
    assert why("pixel8", str(tmp_path / "phone.toml")) is None
    assert "is for pixel8" in str(why("host-cpu", str(tmp_path / "phone.toml")))
    assert "decide nothing" in str(why("host-cpu", str(tmp_path / "emulated.toml")))
    (tmp_path / "orin.toml").write_text('address = "ssh://orin"\ntrtexec = "/usr/src/tensorrt/bin/trtexec"\n')
    assert why("jetson", str(tmp_path / "orin.toml")) is None
    assert "names no trtexec" in str(why("jetson", "local"))
    assert "no other form" in str(why("jetson-nano", "local"))


def test_a_run_with_a_device_ships_what_it_measured(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of compress: forms built and sealed, timed on this host, one shipped, verified, and reported."""
    monkeypatch.setattr(candidates, "PROTOCOL", SHORT)
    request = Request(
        model=tiny.NET, weights=str(weights), data=tiny.DATA, targets=("host-cpu",), device="local",
        macs=0.5, max_drop=0.5, epochs=0, iterations=1, batch=32,
    )  # fmt: skip
    folder = compress(request, tmp_path / "run", bench=False).folder
    report = read_json(folder / "report.json")
    (choice,) = report.choices
    assert choice.device == "local"
    # No layer is left with 16 channels on either side, so that exceptions would leave none of integers.
    assert {c.form for c in choice.candidates} == {"int8", "float32"}
    assert choice.candidates[0].form == choice.form
    assert choice.candidates[0].words.startswith("shipped")
    assert all(c.words.startswith("rejected: ") for c in choice.candidates[1:])
    shipped = (folder / "targets/host-cpu/model.onnx").read_bytes()
    assert shipped == (folder / choice.candidates[0].path).read_bytes()
    assert choice.why in markdown(report)
    assert choice.why in (folder / "report.html").read_text()
    again = compress(request, folder, bench=False)
    assert {"candidates/host-cpu.json", "targets/host-cpu", "verify.json"} <= set(again.skipped)
    assert (folder / "targets/host-cpu/model.onnx").read_bytes() == shipped


def test_a_form_that_cannot_be_made_is_in_the_table_with_its_reason(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same function, but its first weight, folded with its batch norm, lies beyond float16."""
    monkeypatch.setattr(candidates, "PROTOCOL", SHORT)
    state = load_file(weights)
    for name, factor in (("norm.weight", 1e6), ("norm.bias", 1e6), ("second.weight", 1e-6)):
        state[name] = state[name] * factor
    save_file(state, tmp_path / "net.safetensors")
    request = Request(
        model=tiny.NET, weights=str(tmp_path / "net.safetensors"), data=tiny.DATA, targets=("android",),
        device="local", macs=0.5, max_drop=0.9, epochs=0, iterations=1, batch=32,
    )  # fmt: skip
    folder = compress(request, tmp_path / "run", Talk(quiet=True), bench=False).folder
    report = read_json(folder / "report.json")
    (choice,) = report.choices
    assert {c.form for c in choice.candidates if c.bytes is not None} == {"int8", "float32"}
    (absent,) = [c for c in choice.candidates if c.bytes is None]
    assert (absent.form, absent.path, absent.quality) == ("float16", None, None)
    assert absent.words == "left out: relu/weight: its values exceed float16"
    assert f"android, float16: {absent.words}" in markdown(report)


def test_a_run_without_a_device_says_that_it_is_unmeasured(finished: Path) -> None:
    for choice in read_json(finished / "report.json").choices:
        assert choice.why == "int8 as planned, unmeasured: no --device was given"
        assert choice.candidates == ()


def test_a_float16_artefact_is_read_for_the_report(tmp_path: Path) -> None:
    """Its weights lie behind operators that widen them."""
    q, half = quantised("plain", 8.0), load_target("android").half
    assert half is not None
    onnx.save(q.proto, tmp_path / "float.onnx")
    made = half(tmp_path / "float.onnx", tmp_path, "model")
    assert {w.dtype for w in _tflite_weights(made)} == {np.dtype(np.float16)}
    assert sum(w.size for w in _tflite_weights(made)) == sum(w.values.size for w in q.table.weights.values())
    assert _stored(made, q.table) == []
    assert _executed(made, q.table) == {}
