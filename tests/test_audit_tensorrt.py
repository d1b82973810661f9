"""What TensorRT's layer information says of an engine, in the form of each version; any other text is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from audit_nets import DATA, MACS, files, refused_in_one_line, table
from hypothesis import given, settings
from hypothesis import strategies as st

from xedge.audit import audit_one
from xedge.audit_parsers import data_type, parse_layer_info, parse_profile
from xedge.errors import UsageError

__all__ = ["files", "table"]
FORMS = {
    "layers-tensorrt8": "TensorRT 8",
    "layers-tensorrt10": "TensorRT 8.6 to 10",
    "layers-tensorrt11": "TensorRT 11",
}


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
