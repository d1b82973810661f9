"""Latency tables: units of real graphs, what they add up to, and the closed loop on this host."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from ai_edge_litert import schema_py_generated as tfl
from hypothesis import given
from hypothesis import strategies as st
from injected_times import record
from test_agent import run as agent
from test_plan import IDS, MODELS
from torch import nn

from xedge import latency
from xedge.choose import costs_of
from xedge.device import Device, open_device
from xedge.errors import LatencyMissed, UsageError
from xedge.groups import find_groups
from xedge.latency import Grid, LatencyCosts, Table, corrected, stair_of
from xedge.load import load_target
from xedge.measure import QUICK, STANDARD, Protocol
from xedge.measurement import Measurement
from xedge.meter import LatencyMeter
from xedge.models.feqe import feqe
from xedge.models.resnet import resnet20
from xedge.models.srresnet import srresnet
from xedge.onnx_graph import Graph, export_float
from xedge.pipeline import compress
from xedge.plan import allocate
from xedge.progress import Talk
from xedge.prune import cut
from xedge.request import Request
from xedge.run import Run, read_json
from xedge.units import artefact, unit_artefact, units_of


def costs(model: nn.Module, shape: tuple[int, ...], table: Table | None = None) -> LatencyCosts:
    """By a table in which every unit takes its weight's size in nanoseconds, in steps of 16 outside."""
    found = tuple(units_of(export_float(model, shape, 17)))
    macs = costs_of(model, shape, find_groups(model, torch.zeros(1, *shape)))
    axis = (1, 2048)
    ns = np.array([[1000.0 + i * o for o in axis] for i in axis])
    grids = {u.key: Grid((0,) if u.channelwise else axis, axis, ns[: 1 if u.channelwise else 2], 16) for u in found}
    return LatencyCosts(macs, found, table or Table("made up", {}, grids, 500.0, {"dense": 16}, 0))


NETS = {i: m for i, m in zip(IDS, MODELS, strict=True) if i in ("squeezenet", "transposed", "pixel shuffle")}
NETS |= {
    "srresnet": (lambda: srresnet(4, blocks=1, width=16), (3, 8, 8)),
    "feqe": (lambda: feqe(4, blocks=1), (3, 8, 8)),
    "norm alone": (
        lambda: nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 3, 3)),
        (3, 8, 8),
    ),
}


@cache
def exported(name: str) -> tuple[nn.Module, onnx.ModelProto]:
    make, shape = NETS[name]
    model = make().eval()
    return model, export_float(model, shape, 17)


@pytest.mark.parametrize("name", NETS)
def test_units_know_the_widths_of_every_cut(seed: int, name: str) -> None:
    (model, proto), (_, shape) = exported(name), NETS[name]
    groups = find_groups(model, torch.zeros(1, *shape))
    r = np.random.default_rng(seed)
    keep = groups.whole()
    for g in groups.free:
        keep[g.name][r.permutation(g.size)[: r.integers(0, g.size - 1)]] = False
    left = costs_of(model, shape, groups).left({name: int((~mask).sum()) for name, mask in keep.items()})
    small = export_float(cut(model, groups, keep), shape, 17)
    shapes, old, new = Graph(small).shapes, units_of(proto), units_of(small)
    assert [u.kind for u in old] == [u.kind for u in new]
    assert {u.layer for u in old if u.layer} == {n.input[1].removesuffix(".weight") for n in Graph(small).weighted()}
    for was, now in zip(old, new, strict=True):
        out = shapes[now.nodes[-1].output[0]]
        if (was.outside.axes or was.kind not in ("Split", "Slice", "grouped")) and len(out) in (2, 4):
            assert was.widths(left)[1] == out[1], was.key


@pytest.mark.parametrize("name", NETS)
def test_every_unit_is_an_artefact_of_any_width(name: str) -> None:
    for unit in {u.key: u for u in units_of(exported(name)[1])}.values():
        for target in map(load_target, ("android", "host-cpu", "jetson")):
            wide = 12 if unit.outside.axes else unit.outside.fixed
            data = unit_artefact(unit, wide, wide if unit.channelwise else 20, target)
            if target.suffix == ".onnx" and unit.kind in ("dense", "pointwise", "depthwise", "linear"):
                graph = Graph(onnx.load_from_string(data))
                assert [graph.shapes[n][1] for n in graph.inputs] == [12]


def test_a_pixel_shuffle_alone_is_one_operator_as_in_its_net() -> None:
    """LiteRT has it in one order of channels, for which a net's convolution is reordered: no gather is timed."""
    shuffles = [u for u in units_of(exported("srresnet")[1]) if u.kind == "DepthToSpace"]
    assert len(shuffles) == 2
    made = tfl.ModelT.InitFromObj(tfl.Model.GetRootAs(unit_artefact(shuffles[0], 12, 12, load_target("android"))))
    assert [c.builtinCode for c in made.operatorCodes] == [tfl.BuiltinOperator.DEPTH_TO_SPACE]
    assert [tuple(made.subgraphs[0].tensors[i].shape) for i in made.subgraphs[0].inputs] == [(1, 8, 8, 48)]


def test_layers_alike_share_a_key_and_others_do_not() -> None:
    found = units_of(export_float(resnet20().eval(), (3, 32, 32), 17))
    by_layer = {u.layer: u.key for u in found if u.layer}
    assert by_layer["layer1.0.conv1"] == by_layer["layer1.2.conv2"]  # a fused clamp costs nothing
    assert (
        len({by_layer[n] for n in ("layer1.0.conv1", "layer2.0.conv1", "layer2.1.conv1", "layer2.0.shortcut.0")}) == 4
    )
    floats = {u.layer: u.key for u in units_of(export_float(resnet20().eval(), (3, 32, 32), 17), "layer3") if u.layer}
    assert [n for n in by_layer if floats[n] != by_layer[n]] == [n for n in by_layer if n.startswith("layer3")]


def test_a_unit_takes_and_gives_integers_but_where_it_stays_float() -> None:
    proto = export_float(resnet20().eval(), (3, 8, 8), 17)
    unit, real = (units_of(proto, keep)[1] for keep in (None, "layer1"))
    for name in ("android", "host-cpu"):
        target = load_target(name)
        one, other = (len(unit_artefact(u, 64, 64, target)) for u in (unit, real))
        assert other > 2.5 * one  # four bytes a weight
    assert len(artefact(proto, load_target("android"))) < 0.6 * len(artefact(proto, load_target("android"), ""))


# ---- prediction ----


def test_savings_add_up_and_stairs_bound_the_widths(seed: int) -> None:
    model = resnet20().eval()
    model.requires_grad_(False)
    c = costs(model, (3, 16, 16))
    r = np.random.default_rng(seed)
    groups = find_groups(model, torch.zeros(1, 3, 16, 16)).free
    removed = {g.name: int(r.integers(0, g.size // 2)) for g in groups}
    for g in groups:
        more = {**removed, g.name: removed[g.name] + 8}
        assert c.saving(g.name, 8, removed) == pytest.approx(c.total(removed) - c.total(more), abs=1e-9)
    written_alone = next(g for g in groups if g.producers == ("layer3.0.conv1",))
    by_macs = c.macs.widths(written_alone.name, 64, 64, 8)
    assert by_macs == [64, 56, 48, 40, 32, 24, 16, 8]
    # Its consumer's channels inside have no stairs, so every width saves something; of a unit with stairs alone not.
    assert c.widths(written_alone.name, 64, 64, 8) == by_macs
    only = LatencyCosts(c.macs, tuple(u for u in c.units if u.layer == "layer3.0.conv1"), c.table)
    assert only.widths(written_alone.name, 64, 64, 8) == [64, 48, 32, 16]
    scores = {g.name: r.random(g.size) for g in groups}
    sizes = {g.name: g.size for g in groups}
    for between in (None, scores):
        keep = allocate(scores, c, 0.6 * c.total({}), originals=sizes, align=8, between=between)
        assert c.total({n: int((~k).sum()) for n, k in keep.items()}) <= 0.6 * c.total({})
    with pytest.raises(UsageError, match=r"the budget cannot be met: .* ms asked, .* ms is the least"):
        allocate(scores, c, 1e-6, originals=sizes, align=8)


def test_the_scale_makes_the_present_net_take_what_it_took() -> None:
    c = costs(resnet20().eval(), (3, 16, 16))
    for measured in (0.5 * c.total({}), 3 * c.total({})):
        assert corrected(c, measured).total({}) == pytest.approx(measured)
    assert corrected(corrected(c, 1.0), 2.0) == corrected(c, 2.0)


@given(
    stair=st.sampled_from([1, 4, 8, 16]), first=st.integers(1, 40), slope=st.floats(1, 100), noise=st.floats(0, 0.01)
)
def test_stairs_are_found(stair: int, first: int, slope: float, noise: float) -> None:
    widths = [*range(first, first + latency.SWEEP)]
    r = np.random.default_rng(0)
    ns = [500 + slope * stair * -(-w // stair) * (1 + noise * r.standard_normal()) for w in widths]
    found = stair_of(widths, ns)
    assert found == stair or noise * (first + 33) > 0.2 * stair  # noise of a stair's height hides it


def test_between_measured_widths_time_is_a_line_and_at_them_it_is_what_was_measured() -> None:
    grid = Grid((8, 16, 64), (16, 32), np.array([[10.0, 20.0], [18.0, 36.0], [66.0, 132.0]]), 16)
    assert grid.at(16, 32) == 36
    assert grid.at(16, 17) == 36  # on the next stair
    assert grid.at(40, 16) == pytest.approx(42)
    flat = Grid((0,), (8, 24), np.array([[10.0, 30.0]]), 1)
    assert flat.at(16, 16) == 20
    assert flat.at(4, 4) == 5  # the line goes on


# ---- measuring ----


def test_a_bundle_is_timed_in_turns(tmp_path: Path) -> None:
    proto = export_float(resnet20().eval(), (3, 8, 8), 17)
    found = units_of(proto)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as bundle:
        for width in (8, 64):
            bundle.writestr(f"{width}.tflite", unit_artefact(found[1], width, width, load_target("android")))
    code, lines, _ = agent("--bundle", tmp_path / "b.zip", "--runtime", "litert", "--rounds", 4, "--visit-runs", 7)
    assert code == 0
    assert [line["kind"] for line in lines] == ["facts", "probe", "member", "member", "probe", "facts", "end"]
    members = {line["name"]: line["ns"] for line in lines if line["kind"] == "member"}
    assert {name: len(rounds) for name, rounds in members.items()} == {"8.tflite": 5, "64.tflite": 5}
    assert all(len(visit) >= 7 for rounds in members.values() for visit in rounds)
    assert latency.typical([members["64.tflite"][2]]) > latency.typical([members["8.tflite"][2]])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"no zip"), "cannot read"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "holds no model"),
    ],
)
def test_a_bad_bundle_is_refused(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    make(tmp_path / "b.zip")
    code, lines, _ = agent("--bundle", tmp_path / "b.zip", "--runtime", "litert")
    assert code == 2
    assert said in lines[-1]["error"]


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    weights = tiny.train(tmp_path_factory.mktemp("weights") / "net.safetensors")
    return Request(
        model=tiny.NET, weights=str(weights), data=tiny.DATA, targets=("android",), latency=0.001, device="local",
        epochs=0, iterations=1,
    )  # fmt: skip


def test_the_loop_on_this_host(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "PROCESSES", 2)
    monkeypatch.setattr(latency, "SWEEP", 9)
    monkeypatch.setattr("xedge.meter.QUICK", dataclasses.replace(QUICK, processes=2, retries=0))
    monkeypatch.setattr("xedge.meter.STANDARD", dataclasses.replace(QUICK, processes=5, retries=0))
    short = dataclasses.replace(QUICK, min_runs=20, seconds=0.02, warmup_seconds=0.02)
    monkeypatch.setattr("xedge.candidates.PROTOCOL", short)
    told: list[str] = []
    talk = Talk(quiet=True)
    monkeypatch.setattr(Talk, "say", lambda self, line: told.append(line))
    with pytest.raises(LatencyMissed, match=r"--latency 1e-06ms cannot be met: the original takes .* on local"):
        compress(Request(**{**request_.__dict__, "latency": 1e-6, "device": None}), tmp_path / "none", talk)
    assert "  no --device: 1e-06 ms are to be met on this host, which no board is" in told
    assert any("are new to local, measuring" in line for line in told)
    (cached,) = (tmp_path / "cache" / "xedge" / "latency").glob("local-*.json")
    rows = json.loads(cached.read_text())
    table = read_json(tmp_path / "none" / "latency_table.json")
    assert len(rows) == table["points"]
    assert all(len(ns) == 2 and min(map(min, ns)) > 0 for *_, ns in rows)
    first = read_json(tmp_path / "none" / "prune" / "000.latency.json")
    assert first["record"] == "Measurement"
    original = Table.from_json(table)
    assert json.loads(json.dumps(original.to_json())) == table

    slow = np.median([np.median(p["run_ns"]) for p in first["processes"]]) / 1e6
    least = _least(original, request_)
    asked = Request(**{**request_.__dict__, "latency": 0.7 * slow + 0.3 * least})
    for attempt in range(3):  # runs of microseconds on a host that others use: one of three is quiet enough
        told.clear()
        folder = tmp_path / f"some-{attempt}"
        try:
            run = compress(asked, folder, talk, bench=False)
            break
        except LatencyMissed as missed:
            said = missed
    else:
        raise said
    news = [line for line in told if "are new to local" in line]
    assert len(news) <= 1, "the cache knew all but what is timed for its precision"
    assert any(line.startswith("  iteration 1: ") and " ms [" in line for line in told)
    report = read_json(run.folder / "report.json")
    assert report["stopped_by"].startswith(("budget: the budget was met at", "widths:")), report["stopped_by"]
    assert any("ms predicted" in note for note in report["notes"])
    before, after = (row["macs"] for row in report["rows"])
    assert after < before
    told.clear()
    monkeypatch.setattr(latency, "timed_points", None)  # nothing is measured again
    monkeypatch.setattr("xedge.precision.timed_points", None)
    monkeypatch.setattr("xedge.meter.measure", None)
    compress(asked, folder, talk, bench=False)


@pytest.mark.parametrize(
    ("quick", "asked"),
    [
        (record([0.8] * 7), [QUICK]),
        (record([1.2] * 7), [QUICK]),
        (record([0.8] * 6 + [1.2]), [QUICK, STANDARD]),
        (record([1.2] * 7, verdict="throttled"), [QUICK, STANDARD]),
    ],
    ids=["under", "over", "astride", "throttled"],
)
def test_what_a_quick_look_leaves_open_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Measurement, asked: list[Protocol]
) -> None:
    given: list[Protocol] = []
    found = {QUICK: quick, STANDARD: record([0.9] * 11)}
    monkeypatch.setattr("xedge.meter.measure", lambda *a: given.append(a[-1]) or found[a[-1]])
    proto = export_float(tiny.net().eval(), (1, 8, 8), 17)
    target = load_target("android")
    table = Table("made up", {}, {}, 0.0, {}, 0)
    with Run.open(tmp_path / "run", {}) as run:
        meter = LatencyMeter(
            run, "local", target, (1, 8, 8), 1.0, table, tuple(units_of(proto)), None, Talk(quiet=True)
        )
        (tmp_path / "weights").write_bytes(b"some")
        spent = meter.spent(0, tiny.net().eval(), tmp_path / "weights")
    assert given == asked
    assert spent.cost == found[asked[-1]].interval.upper


def _least(table: Table, request: Request) -> float:
    """By the table, of the net with an eighth of its channels."""
    model = tiny.net().eval()
    c = costs(model, (1, 8, 8), table)
    groups = find_groups(model, torch.zeros(1, 1, 8, 8)).free
    return c.total({g.name: g.size - c.widths(g.name, g.size, g.size, 8)[-1] for g in groups})


def test_a_damaged_cache_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "local-1.json"
    cache = latency._Cache(path)
    cache.add({("conv", 8, 8): [[5, 6], [7, 8]]})
    assert latency._Cache(path).raw == {("conv", 8, 8): [[5, 6], [7, 8]]}
    path.write_bytes(path.read_bytes()[:-4])
    assert latency._Cache(path).raw == {}


def test_the_cache_is_the_users_and_of_this_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert latency.cache_folder() == tmp_path / "xedge" / "latency"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert latency.cache_folder() == Path.home() / ".cache" / "xedge" / "latency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert latency.cache_folder() == Path.home() / ".cache" / "xedge" / "latency"
    target = load_target("android")
    with open_device("local") as device:
        same = [latency.cache_file(device, target, {"cpu_model": "a", "load_average": n}) for n in (1, 2)]
        assert same[0] == same[1]
        others = {latency.cache_file(device, target, {"cpu_model": "b"})}
        others |= {latency.cache_file(device, load_target("host-cpu"), {"cpu_model": "a"})}
        others |= {latency.cache_file(device, target, {"cpu_model": "a", "runtime_version": "2"})}
        monkeypatch.setattr(latency, "writers", lambda: ["another"])
        others |= {latency.cache_file(device, target, {"cpu_model": "a"})}
        assert len({*others, *same}) == 5


def test_an_emulated_device_has_no_latency_budget() -> None:
    with open_device("local") as local:
        emulated = Device("qemu", "emulated", None, local.transport, "local", local.python)
        with pytest.raises(UsageError, match="device qemu: is emulated, and a latency budget needs a real device"):
            latency.need_real(emulated)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"macs": 0.5}, "--latency and --macs exclude each other"),
        ({"device": "nowhere"}, "--device nowhere: no such kind of device"),
        ({"stop": "energy"}, "takes no --latency"),
        ({"targets": ("android", "jetson")}, "--latency is for one target, and these are: android, jetson-orin-nano"),
    ],
)
def test_bad_requests(request_: Request, tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        compress(Request(**{**request_.__dict__, **more}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []


def test_a_device_without_python_has_no_table(request_: Request, tmp_path: Path) -> None:
    file = tmp_path / "phone.toml"
    file.write_text('address = "adb://X"\nbenchmark_model = "/data/local/tmp/benchmark_model"\n')
    with pytest.raises(UsageError, match="device phone: times by benchmark_model alone, and a latency table needs"):
        compress(Request(**{**request_.__dict__, "device": str(file)}), tmp_path / "run")
