"""Does a device compute what this host computes? Asked before a browser is timed, whose kernels are other ones."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xedge.device import Device
from xedge.errors import DeviceError, UnsupportedGraph
from xedge.measure import agent_lines, agent_path, runtime_for
from xedge.measurement import Agreement

LEAST_DB = 26.0
"""Signal over difference: a twentieth of the signal. Kernels that round differently lie far above, wrong ones below."""


def check_outputs(device: Device, model: Path, count: int = 4, seed: int = 0) -> Agreement | None:
    """How the device's outputs for `count` seeded inputs compare with those of this host's runtime.

    None for a model of several inputs, which is not compared.

    Raises:
        UnsupportedGraph: they differ by more than rounding, or either runtime refuses the model.
        DeviceError: the device was lost.
    """
    from xedge.benchmarks import agent

    runtime, where = runtime_for(model), f"{model.name} on {device.name}"
    try:
        native = agent.load(str(model), runtime, 1)
        if len(native.inputs) != 1:
            return None
        _, shape, dtype = native.inputs[0]
        batch = agent.made_input((count * shape[0], *shape[1:]), dtype, np.random.default_rng(seed))
        expected = agent.outputs(native, batch)
    except agent.AgentError as error:
        raise UnsupportedGraph(str(error), where=f"{model.name} on this host") from error
    found = outputs_on(device, model, runtime, batch)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        what = f"gives {list(found.shape)} {found.dtype}, this host {list(expected.shape)} {expected.dtype}"
        raise UnsupportedGraph(what, where=where)
    unit: Literal["steps", "range"] = "steps" if np.issubdtype(expected.dtype, np.integer) else "range"
    if np.array_equal(found, expected):
        return Agreement(count, 0.0, unit, None)
    decibels = signal_over_difference(expected, found)
    if not decibels >= LEAST_DB:
        raise UnsupportedGraph(
            f"computes something else than this host: {decibels:.0f} dB", where=where, fix="try the other runtime"
        )
    apart = float(np.abs(found.astype(np.float64) - expected).max())
    return Agreement(count, apart if unit == "steps" else apart / float(np.ptp(expected)), unit, decibels)


def outputs_on(device: Device, model: Path, runtime: str, batch: NDArray[np.generic]) -> NDArray[np.generic]:
    """The model's first output for `batch` [N, ...], from the agent on the device. Raises as `check_outputs` does."""
    transport = device.transport
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place, "inputs.npy"), Path(place, "outputs.npy")
        np.save(given, batch, allow_pickle=False)
        agent, remote, inputs = (transport.push(path) for path in (agent_path(), model, given))
        outputs = f"{inputs.rpartition('/')[0]}/outputs.npy"
        argv = [*device.python, agent, "--model", remote, "--runtime", runtime, "--input", inputs, "--output", outputs]
        done = transport.run(argv, 300.0)
        agent_lines(done, f"{model.name} on {device.name}")
        transport.pull(outputs, made)
        try:
            return np.asarray(np.load(made, allow_pickle=False))
        except ValueError as error:
            raise DeviceError("its outputs are garbled", where=device.name, fix="run it again") from error


def signal_over_difference(expected: NDArray[np.generic], found: NDArray[np.generic]) -> float:
    """In dB, of the signal's deviation from its mean; below any bound where `found` is not finite."""
    signal = expected.astype(np.float64)
    difference = found.astype(np.float64) - signal
    power = float(np.mean((signal - signal.mean()) ** 2))
    error = float(np.mean(difference**2))
    return 10 * float(np.log10(power / error)) if np.isfinite(error) and power > 0 and error > 0 else -np.inf
