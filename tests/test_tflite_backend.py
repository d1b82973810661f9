"""targets/tflite on ONNX's own backend tests of single nodes."""

from __future__ import annotations

import collections
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.loader
import pytest
from onnx import numpy_helper

from xedge.errors import UnsupportedGraph, UsageError
from xedge.targets import tflite

# Nodes that TFLite cannot express, by the cases' names, and what docs/targets.md says of them; each must be refused in
# one line, not written wrongly.
REFUSED = {
    "(pool|transpose)_[13]d": "one or three spatial axes",
    "cubic": "cubic",
    "antialias": "antialias",
    "crop_and_resize": "crops",
    "not_larger|not_smaller": "keeps the aspect ratio",
    "half_pixel_symmetric": "`half_pixel_symmetric`",
    "sizes_linear_pytorch_half_pixel": "`pytorch_half_pixel` to a single pixel",
    "downsample_scales_linear(_align_corners)?$": "scales that do not give whole sizes",
    "2d_indices": "a Gather whose index has several axes",
    "prelu_example": "a PRelu whose slope differs between images",
    "training_": "training mode",
    "old$": "older than 13",
    "empty|allowzero_reordered|zero_size": "no fixed size",
}
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "targets.md").read_text()


@pytest.fixture(scope="module")
def node_tests() -> list[Any]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the cases divide by zero on purpose while they are made
        return list(onnx.backend.test.loader.load_model_tests(kind="node"))


def test_onnx_backend_node_tests(node_tests: list[Any]) -> None:
    """Every float case of ONNX's own suite whose operators are all on the list; weights given as constants."""
    known, passed, refused = set(tflite.operators()), collections.Counter[str](), []
    for case in node_tests:
        kinds = {n.op_type for n in case.model.graph.node}
        if not kinds <= known or "_expanded" in case.name or any(n.domain for n in case.model.graph.node):
            continue
        inputs, outputs = case.data_sets[0]
        if not inputs or any(getattr(a, "dtype", None) != np.float32 for a in (inputs[0], *outputs)):
            continue
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        for value, array in zip(list(model.graph.input)[1:], inputs[1:], strict=True):
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        del model.graph.input[1:]
        try:
            run = tflite.runner(tflite.convert(model, batch=None)).interpreter
        except (UnsupportedGraph, UsageError) as error:
            refused.append(f"{case.name}: {error}")
            continue
        x = inputs[0].transpose(0, 2, 3, 1) if inputs[0].ndim == 4 else inputs[0]
        run.set_tensor(run.get_input_details()[0]["index"], np.ascontiguousarray(x))
        run.invoke()
        for detail, wanted in zip(run.get_output_details(), outputs, strict=True):
            got = run.get_tensor(detail["index"])
            got = got.transpose(0, 3, 1, 2) if got.ndim == 4 else got
            np.testing.assert_allclose(got, wanted, rtol=case.rtol, atol=1e-5, err_msg=case.name)
        passed[case.model.graph.node[0].op_type] += 1
    matched = [[p for p in REFUSED if re.search(p, line.split(":")[0])] for line in refused]
    assert [line for line, found in zip(refused, matched, strict=True) if "\n" in line or not found] == []
    assert {p for found in matched for p in found} == set(REFUSED), "what is written now is on the list no more"
    assert passed["MatMul"] >= 7, "matrices and vectors"
    assert sum(passed.values()) >= 190, passed
    assert len(passed) >= 34, passed


def test_the_docs_name_what_is_refused() -> None:
    limits = " ".join(PAGE.partition("What of these is refused")[2].partition("###")[0].split())
    assert [words for words in REFUSED.values() if words not in limits] == []
