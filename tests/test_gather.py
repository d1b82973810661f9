"""Codebooks in ONNX: the file that gathers computes what the decoded file computes, and is as small as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from flavours import SHAPE, images, quantised, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from xedge.assemble import _stored
from xedge.audit import audit_one
from xedge.codebook import quantize_by_codebook
from xedge.export import write_flavour
from xedge.gather import decoding, indices, packed, width
from xedge.onnx_graph import Graph, session
from xedge.quantize import ScaleTable


def decode(values: np.ndarray, bits: int, *, exact: bool) -> np.ndarray:
    """What ONNX Runtime makes of the stored form."""
    tensors, nodes = decoding("w", values, bits)
    out = helper.make_tensor_value_info("w_q", TensorProto.INT8, values.shape)
    graph = helper.make_graph(nodes, "g", [], [out], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(session(model, exact=exact).run(None, {})[0])


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.integers(1, 40), st.booleans())
def test_what_is_packed_is_gathered(seed: int, bits: int, n: int, exact: bool) -> None:
    draw = np.random.default_rng(seed)
    book = draw.choice(np.arange(-127, 128), 2**bits, replace=False)
    values = draw.choice(book, (n, 3)).astype(np.int8)
    stored, found = packed(values, bits)
    assert stored.nbytes == -(-3 * n * bits // 8)
    assert len(found) <= 2**bits
    assert (width(values) or 9) <= bits
    assert np.array_equal(decode(values, bits, exact=exact), values)


def test_more_than_sixteen_values_have_no_short_index() -> None:
    assert width(np.arange(16, dtype=np.int8)) == 4
    assert width(np.arange(17, dtype=np.int8)) is None


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_the_file_that_gathers_is_the_decoded_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    q = quantised(name)
    table = quantize_by_codebook(q.proto, q.calibration, mean_bits=3.5)
    table.save(tmp_path / "table")
    assert ScaleTable.load(tmp_path / "table").codebooks
    small = write_flavour(q.proto, table, "onnxruntime")
    whole = write_flavour(q.proto, replace(table, codebooks=False), "onnxruntime")
    x = images(4, 1, SHAPE)
    for exact in (True, False):
        assert np.array_equal(run(small, x, exact=exact).numpy(), run(whole, x, exact=exact).numpy())
    for flavour in ("tensorrt", "litert"):
        assert not any(n.op_type == "Gather" for n in write_flavour(q.proto, table, flavour).graph.node)
    onnx.save(small, tmp_path / "small.onnx")
    onnx.save(whole, tmp_path / "whole.onnx")
    graph = Graph(small)
    coded = {n: w for n, w in table.weights.items() if width(w.values) is not None}
    assert coded
    for weight, w in coded.items():
        index = indices(graph, weight)
        assert np.array_equal(graph.array(f"{weight}_codebook")[index], w.values.reshape(-1))
    saved = sum(w.values.size * (8 - (width(w.values) or 8)) // 8 for w in table.weights.values())
    # A layer's constants and nodes take a kilobyte, more than the least layers save.
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size - saved + 1500 * len(
        coded
    )
    assert sum(v.size for v in _stored(tmp_path / "small.onnx", table)) == sum(
        w.values.size for w in table.weights.values()
    )
    one, other = audit_one(tmp_path / "small.onnx"), audit_one(tmp_path / "whole.onnx")
    assert [(a.name, a.precision, a.macs) for a in one.layers] == [(a.name, a.precision, a.macs) for a in other.layers]


def test_onnx_runtime_decodes_when_it_loads(tmp_path: Path) -> None:
    q = quantised("plain")
    table = quantize_by_codebook(q.proto, q.calibration, mean_bits=3.5)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    model = write_flavour(q.proto, table, "onnxruntime")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = {n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node}
    assert "QLinearConv" in ops
    assert not ops & {"Gather", "BitShift", "Cast", "Conv"}
