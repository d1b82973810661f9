"""A TensorRT engine built and run: on doubles of TensorRT and of the driver, and on this machine if it can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jetson_artefact import NANO, artefact, facts_of, half_net, model_of
from numpy.typing import NDArray
from onnx import helper
from tensorrt_doubles import DriverDouble, TensorRTDouble

from xedge.errors import DeviceError, UnsupportedGraph, UsageError
from xedge.targets import tensorrt, tensorrt_engine
from xedge.targets.tensorrt_engine import Cuda, Facts


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((count, 16, 8, 8), dtype=np.float32)


@pytest.mark.parametrize(
    ("version", "strongly", "network", "flags"),
    [
        ("8.5.2.2", False, 0b01, {"INT8", "FP16"}),
        ("8.5.2.2", True, 0b01, {"INT8", "FP16"}),  # it knows no strong typing
        ("10.3.0", False, 0b00, {"INT8", "FP16"}),
        ("10.3.0", True, 0b10, set()),
        ("11.1.0", False, 0b10, set()),
    ],
)
def test_engine_is_built_with_the_versions_own_flags_and_runs(
    tmp_path: Path, version: str, strongly: bool, network: int, flags: set[str]
) -> None:
    folder = artefact(tmp_path / "a")
    trt, driver = TensorRTDouble(version), DriverDouble()
    cuda = Cuda(driver)
    built = tmp_path / "built"
    plan = tensorrt_engine.build_engine(folder / "model.onnx", built, strongly_typed=strongly, trt=trt, cuda=cuda)
    if network & 1:  # EXPLICIT_BATCH is flag 0
        assert trt.network_flags & 1
    assert trt.network_flags == network
    assert trt.flags == flags
    assert {p.name for p in built.iterdir()} == {"model.plan", "engine.json", "layers.json", "timing.cache"}
    run = tensorrt_engine.load_engine(plan, folder / "manifest.json", trt=trt, cuda=cuda)
    x = images(3)
    np.testing.assert_array_equal(run(x), 2 * x)
    assert run(x[:0]).shape == (0, 16, 8, 8)
    with pytest.raises(UsageError, match="shape"):
        run(x[:, :, :4])
    assert len(driver.memory) == 2
    del run
    assert not driver.memory


def test_engine_is_built_once_and_again_after_an_update(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "net")
    before = sorted(p.name for p in folder.iterdir())
    old, new, cuda = TensorRTDouble("10.3.0"), TensorRTDouble("10.4.0"), Cuda(DriverDouble())
    for trt, builds in ((old, 1), (old, 1), (new, 1)):
        run = tensorrt_engine.build_or_load(folder / "model.onnx", trt=trt, cuda=cuda)
        np.testing.assert_array_equal(run(images(1)), 2 * images(1))
        assert len(trt.caches) == builds
    assert new.caches == [b"timed here"]
    assert sorted(p.name for p in folder.iterdir()) == before
    assert facts_of(tmp_path / "net.engine" / "engine.json").tensorrt == "10.4.0"


def test_timing_cache_of_another_device_is_left_aside(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "net")
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "timing.cache").write_bytes(b"elsewhere")
    trt = TensorRTDouble("10.3.0")
    tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=Cuda(DriverDouble()))
    assert trt.caches == [b"elsewhere", b""]


def test_float_graph_is_built_without_int8(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    folder = artefact(tmp_path / "a", model_of(nodes, [], TensorRTDouble.SHAPE, 17))
    trt = TensorRTDouble("10.3.0")
    tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=Cuda(DriverDouble()))
    assert trt.flags == {"FP16"}
    trt = TensorRTDouble("10.3.0")
    tensorrt_engine.build_engine(half_net(tmp_path, "h"), tmp_path / "built", trt=trt, cuda=Cuda(DriverDouble()))
    assert trt.flags == {"FP16"}


def test_refused_graph_names_its_node_and_other_versions_are_refused(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "a")
    trt, cuda = TensorRTDouble("10.3.0"), Cuda(DriverDouble())
    trt.refuses = True
    with pytest.raises(UnsupportedGraph, match=r"node 3.*no such operator"):
        tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=cuda)
    trt.__version__ = "8.6.2"
    with pytest.raises(UsageError, match=r"8\.6\.2 is not one of"):
        tensorrt_engine.build_engine(folder / "model.onnx", tmp_path / "built", trt=trt, cuda=cuda)


def test_driver_errors_are_one_line() -> None:
    driver = DriverDouble()
    driver.fails = "cuCtxSetCurrent"
    with pytest.raises(DeviceError, match=r"cuCtxSetCurrent with error 700"):
        Cuda(driver)


def test_present_facts_come_from_the_board(tmp_path: Path) -> None:
    trt, cuda = TensorRTDouble("10.3.0.30"), Cuda(DriverDouble())
    assert tensorrt_engine.present_facts(trt, cuda, tmp_path) == Facts("10.3.0", "8.7", "Orin")
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    (tmp_path / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37\n"
    )
    assert tensorrt_engine.present_facts(trt, cuda, tmp_path) == NANO


def test_artefact_runs_on_this_machine(tmp_path: Path) -> None:
    """The engine where TensorRT and a GPU are, ONNX Runtime elsewhere: a runner either way."""
    folder = artefact(tmp_path / "a")
    run = tensorrt.load(folder / "model.onnx", 1)
    assert run(images(2)).shape == (2, 16, 8, 8)


def test_engine_of_this_machine_is_the_graph(tmp_path: Path) -> None:
    reason = tensorrt_engine.missing()
    if reason is not None:
        pytest.skip(f"no engine can be built on this machine: {reason}")
    folder = artefact(tmp_path / "a")
    got = tensorrt.load(folder / "model.onnx", 1)(images(4))
    (folder / "manifest.json").unlink()  # then ONNX Runtime runs it
    want = tensorrt.load(folder / "model.onnx", 1)(images(4))
    np.testing.assert_allclose(got, want, atol=0.02 * float(np.abs(want).max()))
