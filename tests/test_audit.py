"""The audit of runs and by command; damaged artefacts and bad input are refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from audit_nets import DATA, files, refused_in_one_line, table
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from xedge import audit as audits
from xedge.audit import audit, audit_one
from xedge.cli import main
from xedge.errors import UnsupportedGraph, UsageError
from xedge.quantize import ScaleTable
from xedge.run import write_json

__all__ = ["files", "table"]


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
