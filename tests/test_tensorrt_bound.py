"""What a TensorRT engine is bound to: any other board, version or artefact is refused, and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jetson_artefact import NANO, artefact

from xedge.errors import UsageError
from xedge.run import digest_file
from xedge.targets import tensorrt_engine
from xedge.targets.tensorrt_engine import BOUND, Facts

text = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=8)


@given(facts=st.builds(Facts, text, text, text, text, text), field=st.sampled_from(BOUND), other=text)
def test_any_fact_that_differs_refuses_and_is_named(facts: Facts, field: str, other: str) -> None:
    record = {"format": 1, **asdict(facts)}
    assert tensorrt_engine.refusal(record, facts) is None
    there = replace(facts, **{field: other})
    reason = tensorrt_engine.refusal(record, there)
    if there == facts:
        assert reason is None
    else:
        assert reason is not None
        assert getattr(facts, field) in reason
        assert other in reason


@pytest.mark.parametrize("field", ["tensorrt", "compute_capability", "gpu"])
def test_engine_that_does_not_say_where_it_was_built_is_refused(field: str) -> None:
    assert tensorrt_engine.refusal({"format": 1, **asdict(replace(NANO, **{field: ""}))}, NANO)
    assert tensorrt_engine.refusal({"format": 1, **asdict(NANO), field: None}, NANO)
    assert tensorrt_engine.refusal(asdict(NANO), NANO)


def test_engine_of_a_board_is_refused_off_the_board() -> None:
    assert tensorrt_engine.refusal({"format": 1, **asdict(NANO)}, replace(NANO, board="", l4t=""))


def engine_beside(folder: Path) -> tuple[Path, Path]:
    plan = folder / "model.plan"
    plan.write_bytes(b"plan")
    record = {"format": 1, "onnx_sha256": digest_file(folder / "model.onnx"), "plan_sha256": digest_file(plan)}
    (folder / "engine.json").write_text(json.dumps({**record, **asdict(NANO)}))
    return plan, folder / "manifest.json"


def _drop(path: Path) -> None:
    path.unlink()


def _swap(path: Path) -> None:
    path.write_bytes(b"another")


def _other_graph(path: Path) -> None:
    path.write_text(json.dumps({"files": {"model.onnx": "0" * 64}}))


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("model.plan", _drop, "no such file"),
        ("model.plan", _swap, "not the file that engine.json describes"),
        ("engine.json", _drop, "no such file"),
        ("engine.json", _swap, "not JSON"),
        ("manifest.json", _other_graph, "another model.onnx"),
    ],
)
def test_engine_that_is_not_the_artefacts_is_refused(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = artefact(tmp_path / "a")
    plan, manifest = engine_beside(folder)
    tensorrt_engine.check_engine(plan, manifest, NANO)
    spoil(folder / name)
    with pytest.raises(UsageError, match=reason):
        tensorrt_engine.check_engine(plan, manifest, NANO)
