"""The audit: what an artefact asks for, joined with what a board says, and everything damaged refused in one line.

`data/audit` holds layer information in the form of each TensorRT version, each file naming where the form was
recorded; benchmark_model's lines are in the forms of its log (TensorFlow 2.10 to 2.17) and CSV.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from xedge import audit as audits
from xedge.audit import audit, audit_one
from xedge.audit_flatbuffer import read_tflite
from xedge.audit_graphs import read_onnx
from xedge.audit_parsers import data_type, parse_layer_info, parse_profile
from xedge.cli import main
from xedge.errors import UnsupportedGraph, UsageError
from xedge.onnx_graph import Graph
from xedge.quantize import ScaleTable, quantize
from xedge.ranges import calibrate
from xedge.run import write_json
from xedge.targets import tflite

DATA = Path(__file__).parent / "data" / "audit"
FORMS = {
    "layers-tensorrt8": "TensorRT 8",
    "layers-tensorrt10": "TensorRT 8.6 to 10",
    "layers-tensorrt11": "TensorRT 11",
}

MACS = {"first": 16 * 16 * 16 * 27, "second": 16 * 8 * 8 * 144, "grouped": 16 * 8 * 8 * 36, "head": 64}
"""By hand: output elements times weights of one output channel."""

# ------------------------------------------------------------------------------------------------------- the net


def float_net() -> onnx.ModelProto:
    """conv 3 -> 16, relu, max pool; residual conv; conv in 4 groups; mean; linear 16 -> 4."""
    draw = np.random.default_rng(0)
    weights = {"first": (16, 3, 3, 3), "second": (16, 16, 3, 3), "grouped": (16, 4, 3, 3), "head": (4, 16)}
    initial = [
        numpy_helper.from_array((draw.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32), f"{n}.weight")
        for n, s in weights.items()
    ]
    initial += [numpy_helper.from_array(np.zeros(s[0], np.float32), f"{n}.bias") for n, s in weights.items()]

    def conv(name: str, x: str, **more: int) -> onnx.NodeProto:
        pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        return helper.make_node("Conv", [x, f"{name}.weight", f"{name}.bias"], [name], name=name, **pads, **more)

    def node(op: str, name: str, *inputs: str, **more: Any) -> onnx.NodeProto:
        return helper.make_node(op, list(inputs), [name], name=name, **more)

    nodes = [
        conv("first", "x"),
        node("Relu", "first_relu", "first"),
        node("MaxPool", "pool", "first_relu", kernel_shape=[2, 2], strides=[2, 2]),
        conv("second", "pool"),
        node("Add", "add", "second", "pool"),
        node("Relu", "add_relu", "add"),
        conv("grouped", "add_relu", group=4),
        node("Relu", "grouped_relu", "grouped"),
        node("GlobalAveragePool", "mean", "grouped_relu"),
        node("Flatten", "flat", "mean"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        initial,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def table() -> ScaleTable:
    images = np.random.default_rng(1).standard_normal((8, 1, 3, 16, 16)).astype(np.float32)
    return quantize(float_net(), calibrate(float_net(), lambda: iter(images)), mean_bits=6.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, table: ScaleTable) -> dict[str, Path]:
    """The net in every flavour, as files."""
    from xedge.export import write_flavour

    folder = tmp_path_factory.mktemp("nets")
    models = {"float": float_net()}
    models |= {f: write_flavour(float_net(), table, f) for f in ("tensorrt", "litert", "onnxruntime")}  # type: ignore[arg-type]
    found = {}
    for flavour, model in models.items():
        found[flavour] = folder / f"{flavour}.onnx"
        onnx.save(model, found[flavour])
    for name, source in (("tflite", "litert"), ("float-tflite", "float")):
        found[name] = folder / f"{name}.tflite"
        found[name].write_bytes(tflite.convert(models[source]))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path], table: ScaleTable) -> Path:
    """A run folder with two targets' artefacts."""
    folder = tmp_path_factory.mktemp("run")
    write_json(folder / "run.json", {})
    table.save(folder / "scales.safetensors")
    for flavour in ("tensorrt", "litert"):
        (folder / f"model.{flavour}.onnx").write_bytes(files[flavour].read_bytes())
    for target, name, source in (("jetson-thor", "model.onnx", "tensorrt"), ("android", "net.tflite", "tflite")):
        (folder / "targets" / target).mkdir(parents=True)
        (folder / "targets" / target / name).write_bytes(files[source].read_bytes())
    return folder


def changed(path: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def bypass(*outputs: str) -> Callable[[onnx.ModelProto], None]:
    """Let the readers of a DequantizeLinear's output read the float tensor before the Q/DQ."""

    def change(model: onnx.ModelProto) -> None:
        made = Graph(model).producer
        before = {}
        for out in outputs:
            q = made.get(made[out].input[0])
            before[out] = q.input[0] if q is not None else ""
        for n in model.graph.node:
            for i, name in enumerate(n.input):
                if name in before:
                    n.input[i] = before[name]

    return change


# ------------------------------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize("name", ["float", "tensorrt", "litert", "onnxruntime"])
def test_onnx_layers_and_macs(files: dict[str, Path], name: str) -> None:
    reading = read_onnx(files[name])
    assert {layer.name: layer.macs for layer in reading.layers} == MACS
    assert reading.flavour == name
    assert reading.operators == 11
    assert {layer.asked for layer in reading.layers} == ({"float32"} if name == "float" else {"int8"})
    assert all(bool(layer.why) == (name == "float") for layer in reading.layers)


@pytest.mark.parametrize(("name", "asked"), [("tflite", "int8"), ("float-tflite", "float32")])
def test_tflite_layers_and_macs(files: dict[str, Path], name: str, asked: str) -> None:
    reading = read_tflite(files[name])
    assert [layer.macs for layer in reading.layers] == list(MACS.values())
    assert [layer.groups for layer in reading.layers] == [1, 1, 4, 1]
    assert {layer.asked for layer in reading.layers} == {asked}
    assert reading.islands == ()


def test_macs_agree_with_torchs_own_counter(tmp_path: Path) -> None:
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.Flatten(), nn.Linear(6 * 12 * 12, 5),
    ).eval()  # fmt: skip
    attributes: dict[str, dict[str, Any]] = {
        "0": {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        "1": {"pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 8},
        "2": {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        "3": {},
        "4": {"transB": 1},
    }
    nodes, held, name = [], [], "x"
    for (index, layer), op in zip(
        net.named_children(), ("Conv", "Conv", "ConvTranspose", "Flatten", "Gemm"), strict=True
    ):
        weights = [(f"{index}.{n}", p.detach().numpy()) for n, p in layer.named_parameters()]
        held += [numpy_helper.from_array(v, n) for n, v in weights]
        out = "y" if index == "4" else f"out{index}"
        nodes.append(helper.make_node(op, [name, *(n for n, _ in weights)], [out], **attributes[index]))
        name = out
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in (("x", [1, 3, 12, 12]), ("y", [1, 5]))]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "net.onnx")
    (tmp_path / "net.tflite").write_bytes(tflite.convert(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 12, 12))
    for reading in (read_onnx(tmp_path / "net.onnx"), read_tflite(tmp_path / "net.tflite")):
        assert 2 * sum(layer.macs for layer in reading.layers) == counter.get_total_flops()


def test_int4_weights_are_no_integers_for_tensorrt(files: dict[str, Path], tmp_path: Path) -> None:
    def int4(model: onnx.ModelProto) -> None:
        for t in model.graph.initializer:
            if t.name in ("second.weight_q", "second.weight_zero_point"):
                values = np.clip(numpy_helper.to_array(t), -7, 7)
                t.CopyFrom(helper.make_tensor(t.name, TensorProto.INT4, t.dims, values.reshape(-1)))
        model.opset_import[0].version = 21
        model.ir_version = 10

    for flavour, asked in (("tensorrt", "int4 weights, float32"), ("litert", "int4")):
        layers = {x.name: x for x in read_onnx(changed(files[flavour], tmp_path, int4)).layers}
        assert layers["second"].asked == asked
        assert layers["second"].integer == (flavour == "litert")


def test_widths_that_lose_integers_are_named(files: dict[str, Path]) -> None:
    risks = {layer.name: "; ".join(layer.risks) for layer in read_onnx(files["tensorrt"]).layers}
    assert risks["first"] == "3 input channels, below 8"
    assert risks["second"] == ""
    assert risks["grouped"].startswith("grouped, 4 x 4 channels")
    assert risks["head"] == "4 output channels, below 8"


def test_why_not(files: dict[str, Path], tmp_path: Path) -> None:
    def of(path: Path, name: str) -> tuple[str, str]:
        (layer,) = (layer for layer in read_onnx(path).layers if layer.name == name)
        return layer.asked, "; ".join(layer.why)

    plain = changed(files["tensorrt"], tmp_path, bypass("add_relu_dq"))
    assert of(plain, "grouped") == ("int8 weights, float32", "its input is not quantised")
    assert of(plain, "second")[0] == "int8", "TensorRT runs int8 into float"

    def float_weight(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "second.weight"))
        (conv,) = (n for n in model.graph.node if n.name == "second")
        conv.input[1] = "second.weight"

    asked, why = of(changed(files["litert"], tmp_path, float_weight), "second")
    assert (asked, why) == ("float32", "its weight is not quantised (an island of float between quantised tensors)")

    open_end = changed(files["onnxruntime"], tmp_path, bypass("add_relu_dq", "grouped_relu_dq"))
    assert of(open_end, "grouped")[1] == "its input is not quantised"


def test_an_open_output_is_float_in_onnx_runtime_and_integer_in_tensorrt(
    files: dict[str, Path], tmp_path: Path
) -> None:
    def open_output(model: onnx.ModelProto) -> None:
        bypass("grouped_relu_dq")(model)
        kept = [n for n in model.graph.node if n.name not in ("grouped_relu_Q", "grouped_relu_DQ")]
        del model.graph.node[:]
        model.graph.node.extend(kept)

    layer = {x.name: x for x in read_onnx(changed(files["onnxruntime"], tmp_path, open_output)).layers}["grouped"]
    assert layer.asked == "int8 weights, float32"
    assert layer.why == ("its output is not quantised, so the runtime computes in float",)
    assert not layer.integer
    assert {x.name: x for x in read_onnx(files["tensorrt"]).layers}["grouped"].integer


def test_fusions_that_q_dq_prevent(files: dict[str, Path], tmp_path: Path) -> None:
    def split(model: onnx.ModelProto) -> None:
        """A Q/DQ between `first` and its Relu."""
        names = ["first", "x_scale", "x_zero_point"]
        q = helper.make_node("QuantizeLinear", names, ["first_q"], name="first_Q")
        dq = helper.make_node("DequantizeLinear", ["first_q", *names[1:]], ["first_dq"], name="first_DQ")
        at = next(i for i, n in enumerate(model.graph.node) if n.name == "first_relu")
        model.graph.node[at].input[0] = "first_dq"
        model.graph.node.insert(at, dq)
        model.graph.node.insert(at, q)

    risks = {x.name: x.risks for x in read_onnx(changed(files["tensorrt"], tmp_path, split)).layers}
    assert "Q/DQ stand between it and first_relu, so they do not fuse" in risks["first"]

    def bare_addition(model: onnx.ModelProto) -> None:
        (add,) = (n for n in model.graph.node if n.name == "add")
        (dq,) = (i for i in add.input if i.endswith("_dq"))
        bypass(dq)(model)
        (conv,) = (n for n in model.graph.node if n.name == "second")
        conv.input[0] = dq

    risks = {x.name: x.risks for x in read_onnx(changed(files["tensorrt"], tmp_path, bare_addition)).layers}
    assert "no input of add is quantised, so addition and convolution do not fuse" in risks["second"]


def test_an_island_of_float_in_a_flatbuffer(files: dict[str, Path], tmp_path: Path) -> None:
    def float_weight(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "second.weight"))
        (conv,) = (n for n in model.graph.node if n.name == "second")
        conv.input[1] = "second.weight"

    path = tmp_path / "island.tflite"
    path.write_bytes(tflite.convert(onnx.load(changed(files["litert"], tmp_path, float_weight))))
    reading = read_tflite(path)
    (island,) = reading.islands
    assert re.match(r"CONV_2D \(operator \d+\)", island)
    found = audit_one(path)
    assert [layer.asked for layer in found.layers] == ["int8", "float32", "int8", "int8"]
    assert found.integer_share == pytest.approx(1 - MACS["second"] / sum(MACS.values()))


# ---------------------------------------------------------------------------------------------------- TensorRT


@pytest.mark.parametrize("form", FORMS)
def test_every_version_says_the_same_of_one_engine(files: dict[str, Path], form: str) -> None:
    found = audit_one(files["tensorrt"], DATA / f"{form}.json")
    assert found.evidence == f"trtexec's layer information ({FORMS[form]})"
    assert {x.name: x.executed for x in found.layers} == {
        "first": "int8", "second": "int8", "grouped": "float16", "head": "int8",
    }  # fmt: skip
    (grouped,) = (x for x in found.layers if x.name == "grouped")
    assert grouped.why[0].startswith("grouped, 4 x 4 channels")
    assert grouped.kernel == "grouped + grouped_relu"
    assert all(not x.why for x in found.layers if x is not grouped)
    assert found.integer_share == pytest.approx(1 - MACS["grouped"] / sum(MACS.values()))


@pytest.mark.parametrize("form", FORMS)
def test_layer_information_cut_anywhere_is_refused(form: str) -> None:
    text = (DATA / f"{form}.json").read_text().rstrip()
    for end in range(1, len(text), 23):
        with pytest.raises(UsageError) as e:
            parse_layer_info(text[:end], "layers.json")
        assert str(e.value).startswith("layers.json: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", 'no list "Layers"'),
        ("{}", 'no list "Layers"'),
        ('{"Layers": {}}', 'no list "Layers"'),
        ('{"Layers": []}', "no layer"),
        ('{"Layers": [{"LayerType": "Conv"}]}', "layer 0 has no name"),
        ('{"Layers": ["a", 1]}', "layer 0 has no name"),
        ('{"Layers": [{"Name": "a", "Inputs": 3}]}', "Inputs are no list"),
        ('{"Layers": [{"Name": "a", "Outputs": ["b"]}]}', "Outputs are no list"),
        ('{"Layers": [{"Name": "a", "Metadata": []}]}', "Metadata is not text"),
        ("[" * 100_000, "not whole JSON"),
        ((DATA / "layers-names-only.json").read_text(), "names of layers only"),
    ],
)
def test_other_json_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_layer_info(text, "layers.json")


KEYS = st.sampled_from(["Layers", "Name", "Inputs", "Outputs", "Weights", "Metadata", "Type", "DataType"])
LEAVES = st.none() | st.integers() | st.text(max_size=8)


def refused_in_one_line(read: Callable[[], object]) -> bool:
    """Whether it is refused; any other error, and any second line, fails the test."""
    try:
        read()
    except UsageError as e:
        return "\n" not in str(e) or pytest.fail(str(e))
    return False


@settings(max_examples=60)
@given(st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(KEYS, x)))
def test_any_json_is_read_or_refused(value: Any) -> None:
    for found in (value, {"Layers": value}, {"Layers": [{"Name": "a", "Inputs": value, "Weights": value}]}):
        text = json.dumps(found)
        refused_in_one_line(lambda text=text: parse_layer_info(text, "layers.json"))  # type: ignore[misc]


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    for parse in (parse_layer_info, parse_profile):
        with pytest.raises(UsageError):
            parse(text, "file")


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Row major linear FP32", "float32"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Half(64,1:8,8,8)", "float16"),
        ("Float", "float32"),
        ("BFloat16", "bfloat16"),
        ("FP8", "float8"),
        ("Int32", "int32"),
        ("N/A due to dynamic shapes", "unknown"),
        ("", "unknown"),
    ],
)
def test_data_types(said: str, means: str) -> None:
    assert data_type(said) == means


def engine(**layer: Any) -> str:
    return json.dumps({"Layers": [{"Name": "second", "LayerType": "CaskConvolution", **layer}]})


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ({"Inputs": [{"Format/Datatype": "Int8"}], "Weights": {"Type": "Float"}}, "float32"),
        ({"Inputs": [{"Format/Datatype": "Half"}], "Weights": {"Type": "Int8"}}, "int8 weights, float16"),
        ({"Inputs": [{"Format/Datatype": "Half"}], "TacticName": "sm80_xmma_gemm_i8f32_i8i32_f32"}, "int8"),
        ({"TacticName": "sm72_xmma_fprop_tf32f32_tf32f32_f32"}, "float32"),
        ({"Inputs": [{"DataType": "Int8", "Format": "Row major linear format"}]}, "int8"),
        ({"Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_precision_is_of_the_arithmetic(layer: dict[str, Any], precision: str) -> None:
    assert parse_layer_info(engine(**layer), "f").layers[0].precision == precision


def test_foreign_nodes_hide_what_is_inside(files: dict[str, Path], tmp_path: Path) -> None:
    info = tmp_path / "layers.json"
    first = {"Name": "first + first_relu", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8"}}
    info.write_text(json.dumps({"Layers": [first, {"Name": "{ForeignNode[second...head]}", "LayerType": "Myelin"}]}))
    found = audit_one(files["tensorrt"], info)
    assert [x.executed for x in found.layers] == ["int8", "unknown", "unknown", "unknown"]
    assert found.integer_share == pytest.approx(MACS["first"] / sum(MACS.values()))
    assert found.notes


def test_another_engine_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    info = tmp_path / "layers.json"
    info.write_text(engine(Weights={"Type": "Int8"}).replace("second", "/model.22/cv2/Conv"))
    with pytest.raises(UsageError, match="names none of the artefact's layers"):
        audit_one(files["tensorrt"], info)


# ------------------------------------------------------------------------------------------------------ LiteRT

HEAD = (
    "INFO: STARTING!\nINFO: Log parameter values verbosely: [0]\nINFO: Graph: [net.tflite]\n"
    "INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"
)
TIMES = (
    "INFO: count=50 first=1411 curr=1409 min=1400 max=1951 avg=1455.28 std=135\n"
    "INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 13764.3, "
    "Inference (avg): 13520.2\n"
)


def replacing(done: int, of: int | None, delegate: str = "TfLiteXNNPackDelegate", parts: int = 1) -> str:
    total = "" if of is None else f" out of {of}"
    return (
        f"INFO: Replacing {done}{total} node(s) with delegate ({delegate}) node, yielding {parts} partitions "
        "for subgraph 0.\n"
    )


def table_of(rows: list[tuple[str, str]]) -> str:
    head = "\t             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]\n"
    line = "\t{:>24}\t    0.057\t    0.057\t  5.668%\t 56.668%\t     0.000\t        1\t{}\n"
    setup = [("ModifyGraphWithDelegate", "ModifyGraphWithDelegate/0"), ("AllocateTensors", "AllocateTensors/0")]
    rule = "============================== {} ==============================\n"
    first, second = ("".join(line.format(*r) for r in part) for part in (setup, rows))
    return (
        f"Profiling Info for Benchmark Initialization:\n{rule.format('Run Order')}{head}{first}\n"
        f"{rule.format('Top by Computation Time')}{head}{first}\n"
        f"Operator-wise Profiling Info for Regular Benchmark Runs:\n{rule.format('Run Order')}{head}{second}\n"
        f"{rule.format('Top by Computation Time')}{head}{second}\nNumber of nodes executed: {len(rows)}\n"
    )


def csv_of(rows: list[tuple[str, str]], start: bool = True) -> str:
    columns = "node type, start, first" if start else "node type, first"
    numbers = "0.150559, 0.03" if start else "0.03"
    body = "".join(f"{kind}, {numbers}, 0.0309657, 14.9436%, 87.5027%, 0, 1, {name}\n" for kind, name in rows)
    return (
        "Operator-wise Profiling Info for Regular Benchmark Runs:\n"
        "============================== Run Order ==============================\n"
        f"{columns}, avg_ms, %, cdf%, mem KB, times called, name\n{body}\n"
        f"Number of nodes executed: {len(rows)}\n"
    )


def audited(path: Path, folder: Path, text: str) -> audits.Audit:
    (folder / "log.txt").write_text(text)
    return audit_one(path, profile=folder / "log.txt")


def test_a_whole_delegation(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    found = audited(files["tflite"], tmp_path, HEAD + replacing(n, n) + TIMES)
    assert found.delegated == f"{n} of {n} operators by TfLiteXNNPackDelegate in 1 partitions"
    assert {(x.executed, x.kernel) for x in found.layers} == {("int8", "TfLiteXNNPackDelegate")}
    assert found.notes == ()


def test_logcat_and_old_lines_are_read(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    prefix = "07-14 13:23:08.148 25289 25289 I tflite  : "
    text = (HEAD + replacing(n, n) + TIMES).replace("INFO: ", prefix)
    assert audited(files["tflite"], tmp_path, text).delegated is not None
    old = audited(files["tflite"], tmp_path, HEAD + replacing(3, None) + TIMES)
    assert old.delegated == "3 operators by TfLiteXNNPackDelegate in 1 partitions"
    assert "which operators were refused" in old.notes[0]
    ancient = "Average inference timings in us: Warmup: 76605.9, Init: 9933, no stats: 66767.6\n"
    none = audited(files["tflite"], tmp_path, "STARTING!\nbenchmark_model\n" + ancient)
    assert none.delegated is None
    assert {x.kernel for x in none.layers} == {"LiteRT's own kernel"}


@pytest.mark.parametrize("form", ["table", "csv", "csv without start"])
def test_a_refused_operator_is_named(files: dict[str, Path], tmp_path: Path, form: str) -> None:
    reading = read_tflite(files["tflite"])
    grouped = reading.layers[2]
    rows = [("TfLiteXNNPackDelegate", "[pool]:9"), (grouped.op, f"[{grouped.name}]:{grouped.index}")]
    log = HEAD + replacing(reading.operators - 1, reading.operators, parts=2) + TIMES
    profile = table_of(rows) if form == "table" else csv_of(rows, start=form == "csv")
    found = audited(files["tflite"], tmp_path, log + profile)
    assert [x.kernel == "LiteRT's own kernel" for x in found.layers] == [False, False, True, False]
    assert found.layers[2].why == ("TfLiteXNNPackDelegate refused it",)
    assert found.integer_share == 1.0, "refused, and still integer"


def test_kernels_inside_the_delegate(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    names = ["Convolution (NHWC, QC8) IGEMM", "Convolution (NHWC, QC8) IGEMM", "Convolution (NHWC, F32) IGEMM",
             "Fully Connected (NC, QS8) GEMM"]  # fmt: skip
    rows = [(name, f"Delegate/{name}:{i}") for i, name in enumerate(names)]
    found = audited(files["tflite"], tmp_path, HEAD + replacing(n, n) + TIMES + table_of(rows))
    assert [x.executed for x in found.layers] == ["int8", "int8", "float32", "int8"]


def test_the_gpu_delegate_computes_in_floating_point(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    found = audited(files["tflite"], tmp_path, HEAD + replacing(n, n, "TfLiteGpuDelegateV2") + TIMES)
    assert found.integer_share == 0.0
    assert {x.executed for x in found.layers} == {"float16 or float32"}


def test_logs_of_other_models_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    for text, said in (
        (HEAD + replacing(539, 548, parts=19) + TIMES, "is of a model with 548 operators"),
        (HEAD + replacing(n + 1, n) + TIMES, "nodes were delegated"),
        (csv_of([("CONV_2D", f"[x]:{n}")]), f"names operator {n}"),
        (csv_of([("SOFTMAX", "[x]:0")]), "says that operator 0 is SOFTMAX; it is CONV_2D"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            audited(files["tflite"], tmp_path, text)


def test_logs_cut_anywhere_are_refused() -> None:
    rows = [("TfLiteXNNPackDelegate", "[pool]:9"), ("CONV_2D", "[a]:3")]
    head = HEAD + replacing(3, 4)
    for end in range(1, len(head) + TIMES.index("Inference (avg)")):
        with pytest.raises(UsageError):
            parse_profile((head + TIMES)[:end], "log")
    for text in (csv_of(rows), csv_of(rows, start=False)):
        for end in range(text.index("cdf%") + 1, text.index("Number of nodes executed")):
            with pytest.raises(UsageError):
                parse_profile(text[:end], "log")
    log = head + TIMES + table_of(rows)
    row = log.rindex("CONV_2D", 0, log.rindex("Top by"))
    for end in range(row + 1, log.index("[a]:3", row), 3):
        with pytest.raises(UsageError, match="cut off"):
            parse_profile(log[:end], "log")


# ---------------------------------------------------------------------------------------------- damaged artefacts


@settings(max_examples=80)
@given(at=st.floats(0, 1), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_artefacts_are_read_or_refused(
    files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, at: float, value: int, cut: bool
) -> None:
    for name in ("tflite", "tensorrt"):
        data = bytearray(files[name].read_bytes())
        place = min(int(at * len(data)), len(data) - 1)
        if cut:
            del data[place:]
        else:
            data[place] = value
        path = tmp_path_factory.getbasetemp() / f"damaged{files[name].suffix}"
        path.write_bytes(data)
        refused_in_one_line(lambda path=path: audit_one(path))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tflite", b"", "TFL3 is missing"),
        ("a.tflite", b"\x1c\0\0\0TFL3" + b"\xff" * 64, "damaged or cut off"),
        ("a.onnx", b"\xff\xff\xff", "damaged or no ONNX"),
        ("a.onnx", b"", "no ONNX model"),
        ("a.plan", b"x", ".plan cannot be audited"),
        ("a", b"x", "a file without a suffix"),
    ],
)
def test_what_is_no_artefact_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(said)):
        audit(tmp_path / name)


# ---------------------------------------------------------------------------------------------------- runs and CLI


def invoke(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["audit", *map(str, words)], prog_name="xedge")
    return done.exit_code, done.stdout, done.stderr


def test_a_run_knows_its_planned_bits(run: Path, table: ScaleTable) -> None:
    planned = {w.layer: float(w.bits.mean()) for w in table.weights.values()}
    assert len(set(planned.values())) > 1, "equal bits would not show a wrong join"
    android, thor = audit(run)
    assert (android.target, thor.target) == ("android", "jetson-thor")
    for found in (android, thor):
        assert {x.name: x.planned_bits for x in found.layers} == planned
    assert audit(run / "targets" / "android")[0] == android
    assert audit(run / "targets" / "android" / "net.tflite")[0] == android


def test_the_command_prints_a_table_and_json(run: Path) -> None:
    code, out, _ = invoke(run, "--layer-info", DATA / "layers-tensorrt10.json")
    assert code == 0
    assert "integer: 87.5% of the MACs, 3 of 4 layers" in out
    assert re.search(r"grouped +Conv +16 -> 16 / 4 +0.037 M +\d\.\d\d +int8 +float16 +grouped, 4 x 4 channels", out)
    code, out, _ = invoke(run, "--json")
    assert code == 0
    found = json.loads(out)["audits"]
    assert [a["target"] for a in found] == ["android", "jetson-thor"]
    assert found[0]["layers"][0]["precision"] == "int8"
    assert "aliases" not in found[0]["layers"][0]


def test_require_integer_exits_with_6(files: dict[str, Path]) -> None:
    info = DATA / "layers-tensorrt11.json"
    assert invoke(files["tensorrt"], "--layer-info", info, "--require-integer", "87%")[0] == 0
    code, out, err = invoke(files["tensorrt"], "--layer-info", info, "--require-integer", "95%")
    assert code == 6
    assert "integer: 87.5%" in out, "the audit is printed in any case"
    assert err.count("\n") == 1
    assert "costliest other layer is grouped (float16: grouped, 4 x 4 channels" in err
    assert invoke(files["float"], "--require-integer", "0.01")[0] == 6
    with pytest.raises(UnsupportedGraph):
        audits.require_integer(audit(files["float"]), 1.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.onnx"], "no such file or folder"),
        (["RUN", "--profile", "missing.txt"], "missing.txt: cannot be read"),
        (["ONNX", "--profile", "x"], "--profile belongs to one .tflite, and here are no .tflite"),
        (["ONNX", "--layer-info", "RUN"], "cannot be read"),
        (["EMPTY"], "holds no .onnx and no .tflite"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    run: Path, files: dict[str, Path], tmp_path: Path, words: list[str], said: str
) -> None:
    names = {"RUN": str(run), "ONNX": str(files["tensorrt"]), "EMPTY": str(tmp_path)}
    code, _, err = invoke(*(names.get(w, w) for w in words))
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_garbage_files_are_one_line_and_exit_2(files: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    for content, said in ((b"\xff\xfe\x00", "is not text"), (b"  \n", "is empty"), (b'{"Layers": [', "not whole JSON")):
        bad.write_bytes(content)
        code, _, err = invoke(files["tensorrt"], "--layer-info", bad)
        assert code == 2
        assert said in err
        assert err.count("\n") == 1
