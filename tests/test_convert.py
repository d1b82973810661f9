"""`xedge convert`: ONNX of any maker to .tflite, whole or not at all, every error one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from xedge.audit import audit_one
from xedge.cli import main
from xedge.errors import UsageError
from xedge.targets import tflite


def invoke(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["convert", *map(str, words)], prog_name="xedge")
    return done.exit_code, done.stdout, done.stderr


def net(path: Path, op: str = "Relu") -> Path:
    draw = np.random.default_rng(0)
    weight = numpy_helper.from_array((draw.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32), "w")
    bias = numpy_helper.from_array(draw.standard_normal(8).astype(np.float32), "b")
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node(op, ["c"], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])],
        [weight, bias],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = list(np.random.default_rng(1).standard_normal((8, 1, 3, 8, 8)).astype(np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"x": self.left.pop()} if self.left else None


def test_a_float_model(tmp_path: Path) -> None:
    model = net(tmp_path / "net.onnx")
    assert invoke(model, "--to", "tflite") == (0, f"{tmp_path / 'net.tflite'}\n", "")
    x = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)
    run = ort.InferenceSession(model)
    expected = np.concatenate([run.run(None, {"x": x[i : i + 1]})[0] for i in range(2)])
    np.testing.assert_allclose(tflite.load(tmp_path / "net.tflite", 1)(x), expected, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.tflite"], "nothing else is left"


def test_a_model_that_onnx_runtime_quantised(tmp_path: Path) -> None:
    model = tmp_path / "quantised.onnx"
    quantize_static(
        net(tmp_path / "net.onnx"), model, Images(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    out = tmp_path / "new" / "folder" / "net.tflite"
    assert invoke(model, "--to", "tflite", "-o", out)[0] == 0
    found = audit_one(out)
    assert found.integer_share == 1.0
    again = out.read_bytes()
    assert invoke(model, "--to", "tflite", "-o", out)[0] == 0
    assert out.read_bytes() == again


def test_errors_are_one_line_and_leave_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "net.tflite"
    out.write_bytes(b"before")
    (tmp_path / "garbage.onnx").write_bytes(b"\xff\xff\xff\xff")
    (tmp_path / "folder.tflite").mkdir()
    model = net(tmp_path / "good.onnx")
    cases = [
        (("missing.onnx", out), 2, "no such file"),
        (("garbage.onnx", out), 2, "not an ONNX model"),
        ((net(tmp_path / "bad.onnx", "Erf"), out), 6, "Erf"),
        ((model, tmp_path / "folder.tflite"), 2, "is a folder"),
        ((model, model), 2, "is the model itself"),
        ((model, out / "below.tflite"), 2, "net.tflite"),
    ]
    for (source, target), code, said in cases:
        got, printed, err = invoke(tmp_path / source, "--to", "tflite", "-o", target)
        assert (got, printed) == (code, "")
        assert said in err
        assert err.count("\n") == 1
    assert out.read_bytes() == b"before"
    assert {p.name for p in tmp_path.iterdir()} == {
        "net.tflite", "garbage.onnx", "folder.tflite", "good.onnx", "bad.onnx",
    }  # fmt: skip


def test_other_formats_are_refused(tmp_path: Path) -> None:
    code, _, err = invoke(net(tmp_path / "net.onnx"), "--to", "coreml")
    assert code == 2
    assert "tflite" in err


def test_the_function_says_where_the_file_is(tmp_path: Path) -> None:
    from xedge.convert import convert

    assert convert(net(tmp_path / "net.onnx"), "tflite") == tmp_path / "net.tflite"
    with pytest.raises(UsageError):
        convert(tmp_path / "nothing.onnx", "tflite")


def test_smaller_weights(tmp_path: Path) -> None:
    model = net(tmp_path / "net.onnx")
    for words in ((), ("--weights", "float16")):
        assert invoke(model, "--to", "tflite", *words)[0] == 0
        x = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)
        run = ort.InferenceSession(model)
        expected = np.concatenate([run.run(None, {"x": x[i : i + 1]})[0] for i in range(2)])
        np.testing.assert_allclose(tflite.load(tmp_path / "net.tflite", 1)(x), expected, atol=5e-3)
    assert invoke(model, "--to", "tflite", "--weights", "int2")[0] == 2


def changed(path: Path, kind: int, batch: int) -> Path:
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    if kind != TensorProto.FLOAT:
        model.graph.input[0].type.tensor_type.elem_type = kind
        model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT))
        model.graph.node[1].input[0] = "cast"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("kind", "name"), [(TensorProto.INT32, "int32"), (TensorProto.UINT8, "uint8")])
def test_an_input_of_another_type_does_not_become_float32_unseen(tmp_path: Path, kind: int, name: str) -> None:
    code, _, err = invoke(changed(net(tmp_path / "net.onnx"), kind, 1), "--to", "tflite")
    assert code == 6
    assert f"input 'x': its type is {name}" in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]


def test_a_batch_that_is_not_kept_is_said(tmp_path: Path) -> None:
    model = changed(net(tmp_path / "net.onnx"), TensorProto.FLOAT, 4)
    code, printed, err = invoke(model, "--to", "tflite")
    assert (code, printed) == (0, f"{tmp_path / 'net.tflite'}\n")
    assert err == "xedge: batch 4 is written as 1\n"
    x = np.random.default_rng(2).standard_normal((4, 3, 8, 8)).astype(np.float32)
    expected = ort.InferenceSession(model).run(None, {"x": x})[0]
    np.testing.assert_allclose(tflite.load(tmp_path / "net.tflite", 1)(x), expected, atol=1e-5)
