"""Boards and phones: every fact has a source, the docs show what the code says, Jetson Nano gets no Q/DQ."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from one_node import CASES, i64, images, one
from onnx import TensorProto, helper, numpy_helper
from qdq import quantized
from tflite_file import floats, operators

from xedge import load
from xedge.cli import main
from xedge.errors import UnsupportedGraph, UsageError
from xedge.target import Fact, Target
from xedge.targets import tflite

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "targets.md").read_text()
BOARDS = ("jetson-nano", "jetson-xavier-nx", "jetson-orin-nano", "jetson-agx-orin", "jetson-thor")
TARGETS = load.targets()

# ------------------------------------------------------------------------------------------------------- facts


def test_the_boards_are_there_under_their_names() -> None:
    assert {*BOARDS, "pixel2", "pixel8", "android", "browser", "host-cpu"} <= set(TARGETS)
    assert load.load_target("jetson").name == "jetson-orin-nano"
    assert load.load_target("android").name == "android"
    aliases = collections.Counter(a for t in TARGETS.values() for a in (t.name, *t.aliases))
    assert max(aliases.values()) == 1


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_every_fact_has_a_source_and_one_name(target: Target) -> None:
    assert target.sources
    assert target.align % 8 == 0
    names = [f.name for f in target.facts]
    assert len(names) == len(set(names))
    for f in target.facts:
        assert re.search(r"[a-z]\.(com|org|io|md)|github|NVIDIA, |arXiv|README", f.source), f
        assert str(f.value).strip()


@pytest.mark.parametrize("name", BOARDS)
def test_boards_say_what_matters(name: str) -> None:
    facts = {f.name: f for f in TARGETS[name].facts}
    assert {"precisions", "GPU cores", "CPU", "memory", "memory bandwidth", "JetPack"} <= set(facts)
    assert any(n.startswith("TensorRT with JetPack") for n in facts)
    assert facts["memory bandwidth"].unit == "GB/s"
    assert TARGETS[name].suffix == ".onnx"


def test_the_docs_name_the_gaps() -> None:
    gaps = {
        f"the {what} of `{name}`"
        for name in (*BOARDS, "pixel2", "pixel8")
        for what in ("CPU", "memory bandwidth")
        if what not in {f.name for f in TARGETS[name].facts}
    }
    (said,) = re.findall(r"Not found in a public source: ([^.]*)\.", " ".join(PAGE.split()))
    assert set(said.split("; ")) == gaps


def test_memory_bandwidth_is_width_times_rate() -> None:
    """The modules' memories by JEDEC rate: bits / 8 x GT/s."""
    buses = {
        "jetson-nano": (64, 3.2), "jetson-xavier-nx": (128, 3.733), "jetson-orin-nano": (128, 6.4),
        "jetson-agx-orin": (256, 6.4), "jetson-thor": (256, 8.533), "pixel2": (64, 3.732),
    }  # fmt: skip
    for name, (bits, rate) in buses.items():
        (said,) = (f.value for f in TARGETS[name].facts if f.name == "memory bandwidth")
        assert float(said) == pytest.approx(bits / 8 * rate, rel=0.005)


def test_a_fact_reads_as_words() -> None:
    assert str(Fact("memory", 8, "GB", "x")) == "8 GB"
    assert str(Fact("JetPack", "5, 6", "", "x")) == "5, 6"


def test_the_command_shows_them() -> None:
    done = CliRunner().invoke(main, ["list", "targets", "--json"])
    found = json.loads(done.stdout)
    assert set(found) == set(TARGETS)
    assert {f["name"]: (f["value"], f["unit"]) for f in found["jetson-thor"]["facts"]}["memory bandwidth"] == (
        273, "GB/s",
    )  # fmt: skip
    assert all(f["source"] for t in found.values() for f in t["facts"])
    assert found["jetson-nano"]["flavour"] == "float"
    plain = CliRunner().invoke(main, ["list", "targets"]).stdout
    assert len(plain.splitlines()) == len(TARGETS)


# ------------------------------------------------------------------------------------------------- Jetson Nano


def graph(*, quantised: bool) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")]
    nodes, x = [], "x"
    if quantised:
        held += [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="x_Q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="x_DQ"),
        ]
        x = "d"
    nodes.append(helper.make_node("Conv", [x, "w"], ["y"], name="conv"))
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 4, 4]), ("y", [1, 4, 4, 4]))
    ]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_jetson_nano_takes_the_float_graph(tmp_path: Path) -> None:
    nano = TARGETS["jetson-nano"]
    onnx.save(graph(quantised=False), tmp_path / "float.onnx")
    (tmp_path / "out").mkdir()
    model = nano.compile(tmp_path / "float.onnx", tmp_path / "out", "net")
    assert model.read_bytes() == (tmp_path / "float.onnx").read_bytes()
    build = (tmp_path / "out" / "build.sh").read_text()
    assert "--fp16" in build
    assert "--int8" not in build
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(nano.load(model, 1)(x), np.repeat(x.sum(1, keepdims=True), 4, 1), rtol=1e-5, atol=1e-5)


def test_jetson_nano_refuses_q_dq(tmp_path: Path) -> None:
    onnx.save(graph(quantised=True), tmp_path / "qdq.onnx")
    with pytest.raises(UnsupportedGraph, match=r"x_Q.*no int8 arithmetic"):
        TARGETS["jetson-nano"].compile(tmp_path / "qdq.onnx", tmp_path, "net")
    with pytest.raises(UsageError, match="not an ONNX model"):
        TARGETS["jetson-nano"].compile(tmp_path / "none.onnx", tmp_path, "net")


# -------------------------------------------------------------------------------------------------------- docs


def facts_table() -> str:
    """The docs' table of targets and the list of its sources."""
    sources: list[str] = []
    rows = ["| target | from | align | facts |", "|---|---|---|---|"]
    for name, t in sorted(TARGETS.items()):
        words = []
        for f in t.facts:
            if f.source not in sources:
                sources.append(f.source)
            words.append(f"{f.name} {f} [{sources.index(f.source) + 1}]")
        rows.append(f"| `{name}` | {t.flavour} | {t.align} | {'; '.join(words) or '-'} |")
    return "\n".join([*rows, "", *(f"{i}. {s}" for i, s in enumerate(sources, 1))])


VANISH = ("Cast", "Constant", "Dropout", "Identity")
INT4 = {
    "Conv": "with `--weights int4`, if not depthwise",
    "ConvTranspose": "read, stored as int8",
    "Gemm": "yes, of an even number of inputs",
    "MatMul": "yes, of an even number of inputs",
}
"""Proven in test_int4.py."""
MORE = {
    "reduce max": one("ReduceMax", (1, 8, 12, 12), (i64(2, 3),), keepdims=1),
    "unsqueeze": one("Unsqueeze", (1, 8), (i64(2, 3),)),
    "div": one("Div", (1, 8, 12, 12), twice=True),
}


@pytest.fixture(scope="module")
def support() -> dict[str, tuple[str, str, str]]:
    """Operator -> (float, int8, int4), by converting models of one operator."""
    tried: dict[str, list[tuple[bool, bool]]] = {}
    for model in [*CASES.values(), *MORE.values()]:
        node = next(n for n in model.graph.node if n.name == "node")
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
        tflite.convert(model)
        try:
            sample = images(2, *shape, seed=3)
            sample = np.abs(sample) + np.float32(0.5) if node.op_type == "Div" else sample  # relu(x) is the divisor
            integer = floats(tflite.convert(quantized(model, sample))) == []
        except UnsupportedGraph:
            integer = False
        tried.setdefault(node.op_type, []).append((True, integer))
    found = {}
    for op in tflite.operators():
        if op in ("QuantizeLinear", "DequantizeLinear"):
            found[op] = ("-", "becomes the tensor's grid", "-")
        elif op in VANISH:
            found[op] = ("folded", "folded", "-")
        else:
            integer = [i for _, i in tried[op]]
            word = "yes" if all(integer) else "by a constant" if any(integer) else "no"
            found[op] = ("yes", word, INT4.get(op, "-"))
    return found


def test_the_docs_table_of_operators(support: dict[str, tuple[str, str, str]]) -> None:
    rows = ["| operator | float | int8 | int4 weights |", "|---|---|---|---|"]
    rows += [f"| {op} | {' | '.join(words)} |" for op, words in support.items()]
    assert "\n".join(rows) in PAGE, "put this into docs/targets.md:\n" + "\n".join(rows)


def test_the_docs_table_of_targets() -> None:
    assert facts_table() in PAGE, f"put this into docs/targets.md:\n{facts_table()}"


@pytest.mark.parametrize("op", VANISH)
def test_what_is_folded_writes_nothing(op: str) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"])]
    last = "r"
    if op == "Constant":
        nodes.append(helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32(2))))
        nodes.append(helper.make_node("Mul", ["r", "c"], ["y"]))
    else:
        nodes.append(helper.make_node(op, ["r"], ["f"], **({"to": TensorProto.FLOAT} if op == "Cast" else {})))
        last = "f"
        nodes.append(helper.make_node("Sigmoid", [last], ["y"]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 4, 4]) for n in ("x", "y")]
    made = helper.make_graph(nodes, "g", values[:1], values[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert sum(operators(tflite.convert(model)).values()) == 2
