"""The agent that goes to the board, with the real aarch64 runtimes, over SSH and ADB; emulated, and said to be."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import arm64
import numpy as np
import onnx
import pytest
from devices import TREE, all_gone
from flavours import images, quantised
from test_adb import Phone, server

from xedge.device import Device, open_device
from xedge.errors import DeviceError, UsageError
from xedge.measure import Protocol, agent_path, measure
from xedge.measurement import gate, to_text
from xedge.targets import tflite
from xedge.transports import adb
from xedge.transports.supervised import Supervised

if TYPE_CHECKING:
    from sshd import Server

pytest_plugins = ["sshd"]
__all__ = ["server"]  # a fixture


@pytest.fixture(scope="module")
def over_ssh(sshd: Server) -> str:
    return f'address = "{sshd.address}"\nssh_config = "{sshd.config}"\n'


@pytest.fixture(scope="module")
def over_adb(server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real adb, and a phone whose Python is the emulated one; its shell is this host's."""
    folder = tmp_path_factory.mktemp("phone")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adb, "BASE", str(folder))
        phone = Phone(folder)
        yield f'address = "adb://{phone.serial}"\n'
        phone.end()


@pytest.fixture(scope="module", params=["over_ssh", "over_adb"])
def board(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("needs qemu-user-static: apt-get install qemu-user-static")
    if not (arm64.ROOT / ".made").exists():
        pytest.skip("needs aarch64 runtimes: python tests/arm64.py")
    file = tmp_path_factory.mktemp("board") / "arm.toml"
    words = ", ".join(f'"{word}"' for word in arm64.python())
    file.write_text(f'{request.getfixturevalue(request.param)}python = [{words}]\nkind = "real"\n')
    with open_device(str(file)) as device:
        yield device


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A residual network in float and in integers, as the two runtimes take it."""
    folder = tmp_path_factory.mktemp("models")
    net = quantised("residual")
    onnx.save(net.proto, folder / "float.onnx")
    onnx.save(net.flavour["onnxruntime"], folder / "integer.onnx")
    onnx.save(net.flavour["litert"], folder / "litert.onnx")
    made = {name: folder / name for name in ("float.onnx", "integer.onnx")}
    made["float.tflite"] = tflite.compile(folder / "float.onnx", folder, "float")
    made["integer.tflite"] = tflite.compile(folder / "litert.onnx", folder, "integer")
    return made


def test_an_emulator_is_called_one_whatever_the_device_file_says(board: Device) -> None:
    facts = board.transport.facts()
    assert facts["emulator"] == "qemu-aarch64-static"
    if isinstance(board.transport, Supervised):  # adb knows the phone's shell, which is this host's here
        assert (facts["machine"], facts["numpy"]) == ("aarch64", np.__version__)
    assert board.kind == "emulated"


def test_a_timeout_leaves_nothing_there_either(board: Device, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="not done after 10 s, killed"):
        board.transport.run([*board.python, "-c", TREE, str(tmp_path / "pids"), "300"], 10)
    assert all_gone(tmp_path / "pids")


def test_a_session_of_this_host_leaves_the_emulated_ones_folder(board: Device, models: dict[str, Path]) -> None:
    """Whoever starts sweeps the folders of the dead, and qemu gives its own process another start time."""
    there = Path(board.transport.push(models["float.onnx"]))
    with open_device("local", wait=None):
        assert there.exists()


def outputs(device: Device, model: Path, x: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "x.npy", x)
    transport = device.transport
    assert isinstance(transport, Supervised | adb.Adb)
    runtime = "onnxruntime" if model.suffix == ".onnx" else "litert"
    words = ["--model", transport.push(model), "--runtime", runtime, "--input", transport.push(folder / "x.npy")]
    done = transport.run([*device.python, transport.push(agent_path()), *words, "--output", "y.npy"], 120)
    assert done.exit_code == 0, done.stdout + done.stderr
    transport.pull(str(transport.folder / "y.npy"), folder / f"y-{device.name}.npy")
    result: np.ndarray = np.load(folder / f"y-{device.name}.npy")
    return result


@pytest.mark.parametrize("name", ["float.onnx", "integer.onnx", "float.tflite", "integer.tflite"])
def test_arm_kernels_give_the_answers_of_this_host(
    board: Device, models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    x = images(8, 7)
    if name.endswith(".tflite"):
        x = x.transpose(0, 2, 3, 1)
    if name == "integer.tflite":
        x = np.clip(np.round(x / 0.03), -128, 127).astype(np.int8)
    arm = outputs(board, models[name], x, tmp_path)
    with open_device("local", wait=None) as here:
        x86 = outputs(here, models[name], x, tmp_path)
    if name.startswith("float"):
        assert np.abs(arm - x86).max() < 1e-5 * np.abs(x86).max()
    else:  # a rounding of one step in a hidden layer moves a logit by about a step
        step = np.abs(np.diff(np.unique(x86))).min()
        assert np.abs(arm.astype(np.float64) - x86).max() <= 2.01 * step
        assert (arm == x86).mean() > 0.8


@pytest.mark.parametrize("name", ["integer.onnx", "integer.tflite"])
def test_a_measurement_says_that_it_is_emulated_and_passes_no_gate(
    board: Device, models: dict[str, Path], name: str
) -> None:
    found = measure(board, models[name], protocol=Protocol("quick", "", 1, 5, 0.0, 0.0, 1.0, 0, 0.0))
    (process,) = found.processes
    package = "onnxruntime" if name.endswith("onnx") else "ai-edge-litert"
    there = process.before["machine"], process.before["runtime_version"]
    assert there == ("aarch64", importlib.metadata.version(package))
    assert len(process.run_ns) >= 5
    assert min(process.run_ns) > 0
    assert found.device_kind == "emulated"
    assert " on arm (emulated), " in to_text(found)
    with pytest.raises(UsageError, match="device arm: is emulated, and a latency gate takes a real device"):
        gate(found, 1e9)
