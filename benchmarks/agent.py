"""Time one model on the device this file was pushed to. One file, the standard library and numpy, Python 3.8+.

    python agent.py --model F --runtime onnxruntime|litert|tflite-runtime [--threads 1] [--seconds 1] [--min-runs 100]
    python agent.py --model F --runtime R --input X.npy --output Y.npy      # no timing: outputs, for parity
    python agent.py --bundle F.zip --runtime R [--rounds 10]                # many small models, in turns

The device only counts nanoseconds; every statistic is made on the host from the raw numbers. The output is JSON, one
object a line, in this order, and a reader must refuse an output without the last one (a connection that dies looks
like success in some shells):

    {"kind": "facts", "when": "before", ...}   what this device is and in which state
    {"kind": "warmup", "ns": [...], "steady": true}
    {"kind": "probe", "when": "before", "ns": [...]}   a fixed computation: slower means the device, not the model
    {"kind": "runs", "ns": [...], "stride": 1}   `invoke` alone; every stride-th run where all would be too many
    {"kind": "probe", "when": "after", "ns": [...]}
    {"kind": "facts", "when": "after", ...}
    {"kind": "end", "lines": 6}

With --bundle each model of the zip file, by its name there, gives one line in place of warm-up and runs. The models
take turns in a new order in each round, so that a drift of the device falls on all of them alike:

    {"kind": "member", "name": "...", "ns": [[...], ...]}   one list for each round, of which the first is the warm-up

An error is one line {"kind": "error", "error": "..."} and exit code 2 for a bad request, 3 where the runtime is not
installed, 4 where the runtime refuses the model or fails.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np

RUNTIMES = ("onnxruntime", "litert", "tflite-runtime")
_MODULES = {"onnxruntime": "onnxruntime", "litert": "ai_edge_litert", "tflite-runtime": "tflite_runtime"}
_X86 = ("x86_64", "AMD64", "i686")
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class AgentError(Exception):
    """Ends the agent with one line. `code`: 2 bad request, 3 no such runtime, 4 the runtime failed."""

    def __init__(self, error: str, code: int) -> None:
        super().__init__(error)
        self.code = code


class Model:
    """A loaded model: `inputs` is (name, shape, dtype) of each input, `set` binds arrays, `invoke` runs once."""

    runtime_version: str
    inputs: list[tuple[str, tuple[int, ...], Any]]
    grid: tuple[float, int] = (0.0, 0)  # scale and zero point of the first input; 0 where it is no integer's

    def set(self, values: list[Any]) -> None:
        raise NotImplementedError

    def invoke(self) -> None:
        raise NotImplementedError

    def output(self) -> Any:
        raise NotImplementedError


class OnnxRuntime(Model):
    """Inputs and outputs are bound once, so that a run is the graph and not Python's copies around it."""

    def __init__(self, source: str | bytes, threads: int) -> None:
        import onnxruntime

        self.runtime_version = str(onnxruntime.__version__)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        if platform.machine() in _X86:
            # Without VNNI, uint8 x int8 kernels saturate in 16 bits: fast, and wrong. Time only what computes right.
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = []
        for given in self._session.get_inputs():
            if given.type not in _NUMPY:
                raise AgentError(f"input {given.name} has type {given.type}, which the agent cannot make", 2)
            shape = tuple(d if isinstance(d, int) else 1 for d in given.shape)  # a symbolic size is a batch of 1
            self.inputs.append((given.name, shape, _NUMPY[given.type]))
        self._binding = self._session.io_binding()
        for result in self._session.get_outputs():
            self._binding.bind_output(result.name)

    def set(self, values: list[Any]) -> None:
        self._values = values  # bound by address: keep them alive
        for (name, _, _), value in zip(self.inputs, values):  # noqa: B905 - Python 3.8 on boards
            self._binding.bind_cpu_input(name, value)

    def invoke(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> Any:
        return self._binding.copy_outputs_to_cpu()[0]


class TensorFlowLite(Model):
    """ai-edge-litert, or its predecessor tflite-runtime: the same Interpreter."""

    def __init__(self, source: str | bytes, threads: int, runtime: str) -> None:
        if runtime == "litert":
            from importlib.metadata import version

            from ai_edge_litert.interpreter import Interpreter

            self.runtime_version = version("ai-edge-litert")
        else:
            import tflite_runtime
            from tflite_runtime.interpreter import Interpreter

            self.runtime_version = str(tflite_runtime.__version__)
        given = {"model_path": source} if isinstance(source, str) else {"model_content": source}
        self._interpreter = Interpreter(num_threads=threads, **given)
        self._interpreter.allocate_tensors()
        details = self._interpreter.get_input_details()
        self.inputs = [(d["name"], tuple(int(s) for s in d["shape"]), d["dtype"]) for d in details]
        self._indices = [d["index"] for d in details]
        self.grid = details[0]["quantization"]
        self._result = self._interpreter.get_output_details()[0]["index"]
        self.invoke = self._interpreter.invoke  # type: ignore[method-assign]  # no wrapper inside the timed region

    def set(self, values: list[Any]) -> None:
        for index, value in zip(self._indices, values):  # noqa: B905
            self._interpreter.set_tensor(index, value)

    def output(self) -> Any:
        return self._interpreter.get_tensor(self._result)


def load(source: str | bytes, runtime: str, threads: int, name: str = "") -> Model:
    """The model, a file or its bytes, ready to run; AgentError 3 where the runtime is absent, 4 where it refuses it."""
    try:
        return OnnxRuntime(source, threads) if runtime == "onnxruntime" else TensorFlowLite(source, threads, runtime)
    except AgentError:
        raise
    except ImportError as error:
        package = "ai-edge-litert" if runtime == "litert" else runtime
        raise AgentError(f"{runtime} is not installed here ({error}): pip install {package}", 3) from error
    except Exception as error:  # the runtimes raise anything, down to bare RuntimeError
        raise AgentError(f"{runtime} refuses {name or os.path.basename(str(source))}: {error}", 4) from error


def made_input(shape: tuple[int, ...], dtype: Any, rng: Any) -> Any:
    """Seeded input of the model's own type: standard normal for floats, the type's whole range for integers."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return np.ascontiguousarray(rng.standard_normal(shape), dtype=kind)
    if kind.kind == "b":
        return rng.integers(0, 2, shape).astype(kind)
    if kind.itemsize > 1:  # wide integers are indices: stay small
        return rng.integers(0, 2, shape, dtype=kind)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


class Steady:
    """Steady state: the means of the last `fast` and of the last `slow` runs agree within 4 % for `hold` runs in a row.

    Each window drops its slowest and fastest quarter first: one preemption by another process is 100 runs of a small
    network and says nothing about warming up. Slow models get shorter windows, so that warm-up plus hold fit in the
    cap; never fewer than 5 runs.
    """

    TOLERANCE = 0.04

    def __init__(self, cap_seconds: float) -> None:
        self._third = cap_seconds * 1e9 / 3
        self._agreed = 0

    @staticmethod
    def _mean(window: list[int]) -> float:
        ordered = sorted(window)
        cut = len(ordered) // 4
        kept = ordered[cut : len(ordered) - cut]
        return sum(kept) / len(kept)

    def reached(self, ns: list[int]) -> bool:
        """Call after every run with all times so far."""
        hold = int(max(5, min(40, self._third / max(1, ns[len(ns) // 2]))))
        if len(ns) < hold:
            return False
        slow, fast = self._mean(ns[-hold:]), self._mean(ns[-max(4, hold // 2) :])
        self._agreed = self._agreed + 1 if abs(fast - slow) <= self.TOLERANCE * slow else 0
        return self._agreed >= hold


def warm_up(invoke: Callable[[], None], least_seconds: float, cap_seconds: float) -> tuple[list[int], bool]:
    """Run until steady and for at least `least_seconds`; give up at the cap. All times are kept."""
    ns: list[int] = []
    steady = Steady(cap_seconds)
    clock = time.perf_counter_ns
    start = clock()
    while True:
        before = clock()
        invoke()
        now = clock()
        ns.append(now - before)
        if steady.reached(ns) and now - start >= least_seconds * 1e9:
            return ns, True
        if now - start >= cap_seconds * 1e9:
            return ns, False


def timed(
    invoke: Callable[[], None], seconds: float, min_runs: int, max_seconds: float, max_runs: int, stride: int = 1
) -> list[int]:
    """Nanoseconds of every `stride`-th run, until both `seconds` and `min_runs` are reached, or either limit is."""
    ns: list[int] = []
    clock = time.perf_counter_ns
    start = now = clock()
    enough, limit = start + int(seconds * 1e9), start + int(max_seconds * 1e9)
    while (now < enough or len(ns) < min_runs) and now < limit and len(ns) < max_runs:
        for _ in range(stride - 1):
            invoke()
        before = clock()
        invoke()
        now = clock()
        ns.append(now - before)
    return ns


def probe(repeats: int = 160) -> list[int]:
    """Nanoseconds of a fixed computation in one thread (about 0.1 ms each), which depends on the core's clock alone."""
    ns = []
    for _ in range(repeats):
        before = time.perf_counter_ns()
        x = 1
        for _ in range(1500):
            x = (x * 1103515245 + 12345) & 0x7FFFFFFF
        ns.append(time.perf_counter_ns() - before)
    return ns


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = _read(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None


def _each(pattern: str) -> Iterable[tuple[str, str]]:
    for path in sorted(glob.glob(pattern)):
        text = _read(path)
        if text:
            yield path, text


def cpu_model() -> str:
    """The processor's name: x86's "model name", a board's device tree, or ARM's implementer and part numbers."""
    board = _read("/proc/device-tree/model")
    seen: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        seen.setdefault(key.strip(), value.strip())
    arm = [seen[k] for k in ("CPU implementer", "CPU part") if k in seen]
    name = seen.get("model name") or seen.get("Hardware") or " ".join(arm) or platform.processor() or "unknown"
    return f"{board}, {name}" if board else name


def facts(when: str) -> dict[str, Any]:
    """What can change a time, as far as the system tells: absent readings are absent, never guessed."""
    cpu = "/sys/devices/system/cpu/"
    found: dict[str, Any] = {
        "kind": "facts",
        "when": when,
        "unix_seconds": round(time.time(), 3),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "governors": sorted({text for _, text in _each(cpu + "cpu[0-9]*/cpufreq/scaling_governor")}),
        "khz": {p.split("/")[5]: int(t) for p, t in _each(cpu + "cpu[0-9]*/cpufreq/scaling_cur_freq") if t.isdigit()},
        "khz_limit": {
            p.split("/")[5]: int(t) for p, t in _each(cpu + "cpu[0-9]*/cpufreq/scaling_max_freq") if t.isdigit()
        },
        "throttle_events": sum(
            int(t) for _, t in _each(cpu + "cpu[0-9]*/thermal_throttle/*_throttle_count") if t.isdigit()
        ),
        "celsius": {},
        "cooling": {},
        "battery": {},
    }
    for path, kind in _each("/sys/class/thermal/thermal_zone*/type"):
        milli = _number(os.path.join(os.path.dirname(path), "temp"))
        if milli is not None and milli > -100000:  # some boards report -256 degrees for "no reading"
            found["celsius"][os.path.basename(os.path.dirname(path)) + " " + kind] = milli / 1000
    for path, kind in _each("/sys/class/thermal/cooling_device*/type"):
        state = _number(os.path.join(os.path.dirname(path), "cur_state"))
        if state is not None and "fan" not in kind.lower():  # a fan that turns does not slow the chip
            found["cooling"][os.path.basename(os.path.dirname(path)) + " " + kind] = state
    for path, text in _each("/sys/class/power_supply/*/capacity"):
        folder = os.path.dirname(path)
        found["battery"][os.path.basename(folder)] = f"{text} % {_read(os.path.join(folder, 'status')) or ''}".strip()
    mode = power_mode(_said("nvpmodel", "-q"))
    if mode is not None:  # a Jetson
        found["nvpmodel"] = mode
        found["jetson_clocks"] = locked_clocks(_said("jetson_clocks", "--show"))  # empty without root
    return found


def _said(*argv: str) -> str | None:
    """What a board's own tool prints, in one line; None where there is none, or where it asks for rights."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return " ".join(done.stdout.split()) if done.returncode == 0 and done.stdout.strip() else None


def power_mode(nvpmodel: str | None) -> str | None:
    """The name and number that `nvpmodel -q` prints: "NV Power Mode: MAXN 0"."""
    return nvpmodel.rpartition("NV Power Mode:")[2].strip() if nvpmodel and "NV Power Mode:" in nvpmodel else None


def locked_clocks(shown: str | None) -> dict[str, bool]:
    """Whether each clock of `jetson_clocks --show` is locked: its least and its largest frequency are one."""
    found = {}
    for name, least, most in re.findall(
        r"(\w+):?\s(?:\s*Online=1 Go\w+=\S+ )?MinFreq=(\d+) MaxFreq=(\d+)", shown or ""
    ):
        found[name] = least == most
    return found


def library_sha256(module: str) -> str | None:
    """Of the largest shared library of an installed package: the runtime's own code."""
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    found = [p for f in folders or [] for p in glob.glob(os.path.join(f, "**", "*.so*"), recursive=True)]
    return _sha256(max(found, key=os.path.getsize)) if found else None


def _memory_kib(name: str) -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return None


def clock_step_ns() -> int:
    """The smallest step the clock was seen to make."""
    steps = []
    for _ in range(200):
        before = time.perf_counter_ns()
        after = time.perf_counter_ns()
        while after == before:
            after = time.perf_counter_ns()
        steps.append(after - before)
    return min(steps)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def first_facts(path: str, runtime: str, model: Model, threads: int, seed: int) -> dict[str, Any]:
    """The facts before, with those that do not change."""
    found = facts("before")
    found.update(
        machine=platform.machine(),
        system=f"{platform.system()} {platform.release()}",
        cpu_model=cpu_model(),
        cores=os.cpu_count(),
        affinity=sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        memory_kib=_memory_kib("MemTotal"),
        python=platform.python_version(),
        numpy=np.__version__,
        runtime=runtime,
        runtime_version=model.runtime_version,
        runtime_sha256=library_sha256(_MODULES[runtime]),
        model=os.path.basename(path),
        model_sha256=_sha256(path),
        agent_sha256=_sha256(__file__),
        inputs=[[name, list(shape), np.dtype(dtype).name] for name, shape, dtype in model.inputs],
        threads=threads,
        seed=seed,
        clock_step_ns=clock_step_ns(),
    )
    return found


def visit(invoke: Callable[[], None], seconds: float, least: int) -> list[int]:
    """Nanoseconds of each run, until both `seconds` and `least` runs are reached."""
    return timed(invoke, seconds, least, 60.0, 1000)


def in_turns(wish: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """Time every model of a bundle."""
    models: dict[str, Model] = {}
    rng = np.random.default_rng(wish.seed)
    try:
        with zipfile.ZipFile(wish.bundle) as bundle:
            for name in bundle.namelist():
                models[name] = load(bundle.read(name), wish.runtime, wish.threads, name)
    except (OSError, zipfile.BadZipFile) as error:
        raise AgentError(f"cannot read {wish.bundle}: {error}", 2) from error
    if not models:
        raise AgentError(f"{wish.bundle} holds no model", 2)
    for model in models.values():
        model.set([made_input(shape, dtype, rng) for _, shape, dtype in model.inputs])
    say(first_facts(wish.bundle, wish.runtime, next(iter(models.values())), wish.threads, wish.seed))
    ns: dict[str, list[list[int]]] = {name: [] for name in models}
    names = list(models)
    before = probe()
    for _ in range(wish.rounds + 1):
        rng.shuffle(names)
        for name in names:
            ns[name].append(visit(models[name].invoke, wish.visit_seconds, wish.visit_runs))
    after = probe()
    say({"kind": "probe", "when": "before", "ns": before})
    for name, rounds in ns.items():
        say({"kind": "member", "name": name, "ns": rounds})
    say({"kind": "probe", "when": "after", "ns": after})
    say(facts("after"))


def outputs(model: Model, batch: Any) -> Any:
    """The model's first output for each picture of `batch` [N, ...], run in the model's own batch size."""
    if len(model.inputs) != 1:
        raise AgentError(f"--input serves models with one input; this one has {len(model.inputs)}", 2)
    name, shape, dtype = model.inputs[0]
    if batch.shape[1:] != shape[1:] or batch.dtype != np.dtype(dtype) or len(batch) == 0 or len(batch) % shape[0]:
        wanted = f"[N * {shape[0]}, {', '.join(map(str, shape[1:]))}] {np.dtype(dtype).name}"
        raise AgentError(f"input {name} wants {wanted}, not {list(batch.shape)} {batch.dtype}", 2)
    results = []
    for start in range(0, len(batch), shape[0]):
        model.set([np.ascontiguousarray(batch[start : start + shape[0]])])
        model.invoke()
        results.append(np.array(model.output()))
    return np.concatenate(results)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AgentError(message, 2)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; AgentError 2 when it is wrong."""
    parser = _Parser(prog="agent.py", description="Time one model on this device; raw nanoseconds as JSON lines.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model")
    what.add_argument("--bundle", help="a .zip of models to be timed in turns")
    parser.add_argument("--runtime", required=True, choices=RUNTIMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus", help="pin to these cores, such as 4,5,6,7")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--min-runs", type=int, default=100)
    parser.add_argument("--max-seconds", type=float, default=120.0)
    parser.add_argument("--max-runs", type=int, default=20_000, help="kept in the output")
    parser.add_argument("--warmup-seconds", type=float, default=0.2, help="warm up at least so long")
    parser.add_argument("--warmup-cap", type=float, default=30.0, help="not steady by then: say so and go on")
    parser.add_argument("--rounds", type=int, default=10, help="of a bundle, after the first")
    parser.add_argument("--visit-seconds", type=float, default=0.001, help="of each model of a bundle in each round")
    parser.add_argument("--visit-runs", type=int, default=5, help="likewise, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", help=".npy [N, ...] in the model's input type, in place of random numbers")
    parser.add_argument("--output", help=".npy for the outputs of --input; nothing is timed then")
    wish = parser.parse_args(argv)
    if wish.threads < 1 or wish.min_runs < 1 or wish.max_runs < wish.min_runs or wish.seed < 0:
        raise AgentError("--threads and --min-runs start at 1, --max-runs at --min-runs, --seed at 0", 2)
    if wish.output and not wish.input:
        raise AgentError("--output needs --input", 2)
    if wish.bundle and wish.input:
        raise AgentError("--bundle takes no --input", 2)
    if wish.rounds < 1 or wish.visit_runs < 1:
        raise AgentError("--rounds and --visit-runs start at 1", 2)
    return wish


def pinned(wish: argparse.Namespace) -> argparse.Namespace:
    """Keep to the cores of --cpus."""
    if wish.cpus:
        try:
            os.sched_setaffinity(0, {int(core) for core in wish.cpus.split(",")})
        except (ValueError, OSError) as error:
            raise AgentError(f"cannot pin to cores {wish.cpus}: {error}", 2) from error
    return wish


def work(wish: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """Do what the command line asks; `say` prints one line."""
    if not os.path.isfile(wish.model or wish.bundle):
        raise AgentError(f"no model file {wish.model or wish.bundle}", 2)
    pinned(wish)
    if wish.bundle:
        in_turns(wish, say)
        return
    batch = None
    if wish.input:
        try:
            batch = np.load(wish.input, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise AgentError(f"cannot read {wish.input}: {error}", 2) from error
    model = load(wish.model, wish.runtime, wish.threads)
    say(first_facts(wish.model, wish.runtime, model, wish.threads, wish.seed))
    if wish.output:
        result = outputs(model, batch)
        with open(wish.output, "wb") as file:
            np.save(file, result, allow_pickle=False)
        say({"kind": "outputs", "shape": list(result.shape), "dtype": str(result.dtype)})
        return
    rng = np.random.default_rng(wish.seed)
    if batch is None:
        values = [made_input(shape, dtype, rng) for _, shape, dtype in model.inputs]
        model.set(values)
    else:
        outputs(model, batch[: model.inputs[0][1][0]])  # checks it, and leaves the first picture set
    ns, steady = warm_up(model.invoke, wish.warmup_seconds, wish.warmup_cap)
    say({"kind": "warmup", "ns": ns, "steady": steady})
    typical = sorted(ns)[len(ns) // 2] / 1e9
    stride = max(1, int(wish.seconds / max(typical, 1e-9) / wish.max_runs) + 1)  # a fast model over a long time
    before = probe()
    runs = timed(model.invoke, wish.seconds, wish.min_runs, wish.max_seconds, wish.max_runs, stride)
    after = probe()
    say({"kind": "probe", "when": "before", "ns": before})
    say({"kind": "runs", "ns": runs, "stride": stride})
    say({"kind": "probe", "when": "after", "ns": after})
    say(facts("after"))


def told(job: Callable[[Callable[[dict[str, Any]], None]], None]) -> int:
    """Run `job`, which is given what prints a line; the exit code."""
    lines = 0

    def say(line: dict[str, Any]) -> None:
        nonlocal lines
        lines += 1
        sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
        sys.stdout.flush()

    try:
        job(say)
    except AgentError as error:
        say({"kind": "error", "error": " ".join(str(error).split())})
        return error.code
    except Exception as error:  # whatever a runtime throws must reach the host as one line
        say({"kind": "error", "error": " ".join(f"{type(error).__name__}: {error}".split())})
        return 4
    say({"kind": "end", "lines": lines})
    return 0


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    return told(lambda say: work(parse(argv), say))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
