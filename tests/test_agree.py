"""How far a device's outputs are from this host's: steps, parts of a range, decibels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from test_agent import convolution

from xedge.agree import check_outputs, signal_over_difference
from xedge.device import Device, open_device
from xedge.load import load_target
from xedge.units import unit_artefact, units_of


@pytest.mark.parametrize(("kind", "by"), [("range", 1e-3), ("steps", 2)])
def test_differences_are_counted_in_steps_of_integers_and_parts_of_a_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by: float
) -> None:
    from xedge.benchmarks import agent

    model = convolution(tmp_path / "conv.onnx")
    if kind == "steps":
        (unit,), model = units_of(onnx.load(model)), tmp_path / "conv.tflite"
        model.write_bytes(unit_artefact(unit, 3, 4, load_target("android")))

    def moved(_: Device, path: Path, runtime: str, batch: np.ndarray) -> np.ndarray:
        right = agent.outputs(agent.load(str(path), runtime, 1), batch)
        right.flat[right.argmax()] -= right.dtype.type(by)
        return right

    with open_device("local") as here:
        monkeypatch.setattr("xedge.agree.outputs_on", moved)
        found = check_outputs(here, model)
    assert found is not None
    assert (found.inputs, found.unit) == (4, kind)
    assert found.snr_db is not None
    if kind == "steps":
        assert found.largest == by
        assert "at most 2 steps apart, for 4 inputs" in str(found)
    else:
        assert 1e-5 < found.largest < by
        assert " of their range apart, for 4 inputs" in str(found)


def test_decibels() -> None:
    signal = np.array([1.0, -1.0, 1.0, -1.0])
    assert signal_over_difference(signal, signal * 1.1) == pytest.approx(20)
    assert signal_over_difference(signal, signal * np.nan) == -np.inf
    assert signal_over_difference(np.ones(3), np.zeros(3)) == -np.inf
