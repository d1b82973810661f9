"""How a latency is measured: fresh processes of one agent on the device, statistics on the host.

    measure(device, model, runtime, STANDARD)     one model: k processes in a row
    compare(device, a, b, STANDARD)               two models: pairs of processes in the order A B, B A, A B ...

A process counts only when its warm-up settled and the device kept its speed, which a fixed probe computation around
the runs shows; others are run again after a cool-down. An interval over the runs of one process would be far too
narrow, and two models timed one after the other differ by whatever the device did in between: both are shown by
simulation in the tests.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xedge import tools
from xedge.device import Device
from xedge.errors import DeviceError, InternalError, UnsupportedGraph, UsageError, nearest
from xedge.measurement import Comparison, Measurement, Process, Verdict
from xedge.transports.base import Completed
from xedge.transports.supervised import sha256

TOLERANCE = 0.10
"""A probe slower than the fastest one by more than this: the device, not the model, changed speed."""

Progress = Callable[[int, int, str], None]
"""(done, total, what): called before each process."""

RUNTIMES = {".onnx": "onnxruntime", ".tflite": "litert"}


@dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Attributes:
        name, summary: as given to ``--protocol``, and what the preset is good for.
        processes: fresh processes of each model; below 7 no interval decides anything.
        min_runs, seconds: of each process; both are reached.
        warmup_seconds, warmup_cap_seconds: of each process; not steady at the cap makes it a fault.
        retries, cooldown_seconds: how often faulty processes are run again, and the pause before.
        max_seconds: of each process, a limit for very slow models.
        max_runs: kept of each process; a very fast model runs its seconds all the same, and every n-th run is kept.
    """

    name: str
    summary: str
    processes: int
    min_runs: int
    seconds: float
    warmup_seconds: float
    warmup_cap_seconds: float
    retries: int
    cooldown_seconds: float
    max_seconds: float = 120.0
    max_runs: int = 20_000


REFERENCE = Protocol("reference", "for publication", 15, 1024, 60.0, 1.0, 30.0, 3, 60.0, 600.0)
STANDARD = Protocol("standard", "for gates and tables", 11, 100, 1.0, 0.3, 30.0, 3, 10.0)
QUICK = Protocol("quick", "a first look: short runs, wider intervals", 7, 30, 0.15, 0.1, 10.0, 1, 0.0)
PRESETS = (REFERENCE, STANDARD, QUICK)


def preset(name: str) -> Protocol:
    """The preset called `name`; UsageError with the nearest one otherwise."""
    for protocol in PRESETS:
        if protocol.name == name:
            return protocol
    raise UsageError("no such protocol", where=f"--protocol {name}", fix=nearest(name, [p.name for p in PRESETS]))


def runtime_for(model: Path) -> str:
    """The runtime that times this kind of file."""
    try:
        return RUNTIMES[model.suffix]
    except KeyError:
        raise UsageError(
            f"no runtime for a {model.suffix or 'nameless'} file", where=str(model), fix=f"give {' or '.join(RUNTIMES)}"
        ) from None


def tool_for(device: Device, model: Path) -> str | None:
    """The program of the device file that times this kind of file in place of the agent."""
    return next((name for name in device.tools if tools.SUFFIXES[name] == model.suffix), None)


def agent_path() -> Path:
    """The agent's file, which is pushed as it is and never imported here."""
    spec = importlib.util.find_spec("xedge.benchmarks.agent")
    if spec is None or spec.origin is None:
        raise InternalError("the package lacks benchmarks/agent.py")
    return Path(spec.origin)


@dataclass(frozen=True)
class _Job:
    """One model as it lies on the device, and how to time it."""

    model: Path
    digest: str
    remote: str
    runtime: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Bench:
    """A device with the agent on it."""

    device: Device
    protocol: Protocol
    threads: int
    cpus: tuple[int, ...]

    def job(self, model: Path, runtime: str | None) -> _Job:
        if not model.is_file():
            raise UsageError("no such model file", where=str(model))
        runtime = runtime or tool_for(self.device, model) or runtime_for(model)
        job = _Job(model, sha256(model), self.device.transport.push(model), runtime)
        return self._engine(job) if runtime == "trtexec" else job

    def _engine(self, job: _Job) -> _Job:
        """The job with the engine that trtexec builds on the device in place of the graph."""
        from xedge.targets.tensorrt import BUILD

        program, transport, where = self.device.tools["trtexec"], self.device.transport, f"{job.model.name} on trtexec"
        major, version = tools.trtexec_version(transport, program)
        if major not in BUILD:
            raise DeviceError(f"TensorRT {version}: flags of {', '.join(map(str, BUILD))} are known", where=program)
        integer = b"DequantizeLinear" in job.model.read_bytes()
        flags = [f for f in BUILD[major] if integer or f != "--int8"]
        engine = f"{job.digest[:16]}.plan"
        skip = "--buildOnly" if major == 8 else "--skipInference"
        done = transport.run([program, f"--onnx={job.remote}", f"--saveEngine={engine}", skip, *flags], 3600)
        if done.exit_code:
            said = [x for x in (done.stdout + done.stderr).splitlines() if "[E]" in x] or [
                f"exit code {done.exit_code}"
            ]
            raise UnsupportedGraph(f"trtexec builds no engine: {said[0].strip()}", where=where)
        facts = {"runtime_version": version, "runtime_sha256": tools.sha256_there(transport, program)}
        return replace(job, remote=engine, facts=facts, flags=tuple(f for f in flags if f not in ("--int8", "--fp16")))

    def run(self, job: _Job, seed: int) -> Process:
        """One fresh process."""
        if job.runtime in tools.SUFFIXES:
            return self._by_tool(job)
        p = self.protocol
        agent = self.device.transport.push(agent_path())  # free but for the first
        argv = [*self.device.python, agent, "--model", job.remote, "--runtime", job.runtime]
        argv += ["--threads", str(self.threads), "--seed", str(seed), "--seconds", str(p.seconds)]
        argv += ["--min-runs", str(p.min_runs), "--max-seconds", str(p.max_seconds), "--max-runs", str(p.max_runs)]
        argv += ["--warmup-seconds", str(p.warmup_seconds), "--warmup-cap", str(p.warmup_cap_seconds)]
        if self.cpus:
            argv += ["--cpus", ",".join(map(str, self.cpus))]
        start_up = 120.0
        done = self.device.transport.run(argv, start_up + p.warmup_cap_seconds + p.max_seconds)
        return read_agent(done, job.digest, f"{job.model.name} on {self.device.name}")

    def _by_tool(self, job: _Job) -> Process:
        """One fresh process of a program in place of the agent."""
        p, transport, program = self.protocol, self.device.transport, self.device.tools[job.runtime]
        where = f"{job.model.name} on {self.device.name}"
        patience = 120.0 + p.warmup_cap_seconds + p.max_seconds
        facts = job.facts or {"runtime_sha256": tools.sha256_there(transport, program), "runtime_version": ""}
        before = {**tools.state(transport), **facts, "model_sha256": job.digest, "threads": self.threads}
        if job.runtime == "benchmark_model":
            argv = tools.benchmark_model(
                program, job.remote, self.threads, p.seconds, p.min_runs, p.warmup_seconds, p.max_seconds, self.cpus
            )
            summary, runs = tools.read_benchmark_model(transport.run(argv, patience), where), ()
        else:
            warmup = 1000 * max(p.warmup_seconds, 0.2)
            argv = [program, f"--loadEngine={job.remote}", f"--warmUp={warmup:g}", f"--iterations={p.min_runs}"]
            argv += [f"--duration={max(1, round(p.seconds))}", "--exportTimes=times.json", *job.flags]
            done = transport.run(argv, patience)
            if done.exit_code:
                raise DeviceError(f"trtexec ended with {done.exit_code}", where=where, fix="run it there by hand")
            text = transport.run(["cat", "times.json"], 60.0).stdout
            transport.run(["rm", "-f", "times.json"], 60.0)  # an old one must never be taken for a new one
            summary, runs = {"statistic": "median"}, tools.read_times(text, warmup, where)  # type: ignore[assignment]
        return tools.process(runs, summary, before, tools.state(transport))

    def measurement(
        self, job: _Job, kept: Sequence[Process], replaced: Sequence[Process], verdict: tuple[Verdict, str]
    ) -> Measurement:
        return Measurement(
            model=job.model.name,
            sha256=job.digest,
            runtime=job.runtime,
            threads=self.threads,
            protocol=self.protocol.name,
            device=self.device.name,
            device_kind=self.device.kind,
            processes=tuple(kept),
            replaced=tuple(replaced),
            verdict=verdict[0],
            reason=verdict[1],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def agent_lines(done: Completed, where: str) -> list[dict[str, Any]]:
    """What the agent printed, to its last line. Raises its error, or DeviceError where the output is cut or garbled."""
    lines: list[dict[str, Any]] = []
    for text in done.stdout.splitlines():
        if text.startswith("{"):  # runtimes print greetings of their own
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                raise DeviceError("the agent's output is garbled", where=where, fix="run it again") from error
    for line in lines:
        if line.get("kind") == "error":
            raise _refusal(str(line["error"]), done.exit_code, where)
    if done.exit_code < 0:
        name = signal.strsignal(-done.exit_code) or "unknown"
        raise DeviceError(
            f"the agent was ended by signal {-done.exit_code} ({name})", where=where, fix="see whether memory was short"
        )
    if not lines or lines[-1].get("kind") != "end" or lines[-1].get("lines") != len(lines) - 1 or done.exit_code:
        said = done.stderr.strip().splitlines()
        hint = said[-1] if said else f"exit code {done.exit_code}"
        raise DeviceError(f"the agent's output has no end ({hint})", where=where, fix="check the connection")
    return lines


def read_agent(done: Completed, digest: str, where: str) -> Process:
    """The agent's output as a Process. DeviceError where it is cut, garbled, or of other bytes than were sent."""
    lines = agent_lines(done, where)
    by_kind: dict[tuple[str, str], dict[str, Any]] = {(x["kind"], x.get("when", "")): x for x in lines}
    try:
        before, warmup = by_kind["facts", "before"], by_kind["warmup", ""]
        process = Process(
            warmup_ns=tuple(warmup["ns"]),
            run_ns=tuple(by_kind["runs", ""]["ns"]),
            stride=by_kind["runs", ""]["stride"],
            steady=bool(warmup["steady"]),
            probe_before_ns=tuple(by_kind["probe", "before"]["ns"]),
            probe_after_ns=tuple(by_kind["probe", "after"]["ns"]),
            before=before,
            after=by_kind["facts", "after"],
        )
    except (KeyError, TypeError) as error:
        raise DeviceError(f"the agent's output lacks {error}", where=where, fix="run it again") from error
    times = (process.warmup_ns, process.run_ns, process.probe_before_ns, process.probe_after_ns)
    if any(not ns or not all(type(t) is int and t >= 0 for t in ns) or not sum(ns) for ns in times):
        raise DeviceError("the agent's times are no times", where=where, fix="check the device's clock")
    if before.get("model_sha256") != digest:
        raise DeviceError("the device timed other bytes than were sent", where=where, fix="run it again")
    return process


def _refusal(error: str, code: int, where: str) -> Exception:
    kinds = {2: UsageError, 3: DeviceError}
    return kinds.get(code, UnsupportedGraph)(error, where=where)


def fault(process: Process, protocol: Protocol) -> tuple[Verdict, str] | None:
    """What is wrong with one process by itself, or None."""
    if not process.steady:
        return "not-steady", f"warm-up did not settle within {protocol.warmup_cap_seconds:g} s"
    measured, runs = process.stride * sum(process.run_ns) / 1e9, len(process.run_ns)
    if not process.run_ns:
        runs = int(process.summary["count"])
        measured = protocol.seconds if runs >= protocol.min_runs else 0.0  # it stops by itself when both are reached
    # 0.8: the clock readings between runs count towards the agent's seconds, and weigh in for microsecond models.
    if runs < protocol.min_runs or (measured < 0.8 * protocol.seconds and runs < protocol.max_runs):
        return "incomplete", f"{runs} runs in {measured:.3g} s"
    changed = [
        key for key in ("governors", "khz_limit", "nvpmodel") if process.before.get(key) != process.after.get(key)
    ]
    if changed:
        return "throttled", f"{' and '.join(changed)} changed during the runs"
    if process.after.get("throttle_events", 0) > process.before.get("throttle_events", 0):
        return "throttled", "the processor counted thermal throttling"
    hot, cold = process.after.get("cooling", {}), process.before.get("cooling", {})
    warmer = [name for name, state in hot.items() if state > cold.get(name, 0)]
    if warmer:
        return "throttled", f"cooling stepped in: {warmer[0]}"
    return None


def slowdown(probes: Sequence[float]) -> float:
    """The slowest probe over the fastest, minus 1."""
    return max(probes) / min(probes) - 1


def faults(processes: Sequence[Process], protocol: Protocol) -> dict[int, tuple[Verdict, str]]:
    """Which of one model's processes must be run again, and why.

    Besides their own faults: those with a probe over 10 % slower than the fastest probe of all, the cool device's.
    """
    best = min(probe for process in processes for probe in process.probes_ns)
    found: dict[int, tuple[Verdict, str]] = {}
    for i, process in enumerate(processes):
        own = fault(process, protocol)
        slower = max(process.probes_ns) / best - 1
        if own:
            found[i] = own
        elif slower > TOLERANCE:
            found[i] = "throttled", f"the device was {slower:.0%} slower than at its best"
    return found


def pair_fault(one: Process, other: Process, protocol: Protocol) -> tuple[Verdict, str] | None:
    """What is wrong with a pair: a fault of either, or a device that changed speed between or within them."""
    own = fault(one, protocol) or fault(other, protocol)
    if own:
        return own
    change = slowdown([*one.probes_ns, *other.probes_ns])
    return ("throttled", f"the device's speed changed by {change:.0%} within a pair") if change > TOLERANCE else None


def _verdict(found: Mapping[int, tuple[Verdict, str]], total: int, what: str) -> tuple[Verdict, str]:
    """One verdict for all: the gravest fault, with how many have one."""
    order: tuple[Verdict, ...] = ("incomplete", "not-steady", "throttled")
    for verdict in order:
        same = [reason for v, reason in found.values() if v == verdict]
        if same:
            return verdict, f"{len(found)} of {total} {what}, such as: {same[0]}"
    return "ok", ""


def pairs_verdict(found: Mapping[int, tuple[Verdict, str]], total: int) -> tuple[Verdict, str]:
    """Of a comparison, from the pairs still at fault after the retries.

    Fewer than half disturbed pairs do not spoil it: the disturbance falls on either side alike, because the order
    alternates, so it can only widen the order-statistic interval. The reason names them all the same.
    """
    verdict, reason = _verdict(found, total, "pairs")
    return ("ok" if verdict == "throttled" and 2 * len(found) < total else verdict), reason


def _bench(device: Device, protocol: Protocol, threads: int, cpus: Sequence[int]) -> _Bench:
    return _Bench(device, protocol, threads, tuple(cpus) or device.cpus)


def _silent(done: int, total: int, what: str) -> None:
    pass


def measure(
    device: Device,
    model: Path,
    runtime: str | None = None,
    protocol: Protocol = STANDARD,
    progress: Progress = _silent,
    *,
    threads: int = 1,
    cpus: Sequence[int] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> Measurement:
    """Time one model.

    Args:
        model: an .onnx or .tflite file on this host.
        runtime: ``onnxruntime``, ``litert`` or ``tflite-runtime``; by the file's suffix when None.
        cpus: cores to pin to, such as a phone's big ones; the device's own list when empty.
        sleep: how to cool down.

    Raises UsageError (no such file), UnsupportedGraph (the runtime refuses it), DeviceError (lost, or no runtime).
    """
    bench = _bench(device, protocol, threads, cpus)
    job = bench.job(model, runtime)
    kept: list[Process] = []
    for i in range(protocol.processes):
        progress(i, protocol.processes, f"{model.name}, {job.runtime}")
        kept.append(bench.run(job, i))
    replaced: list[Process] = []
    found = faults(kept, protocol)
    for _ in range(protocol.retries):
        if not found:
            break
        sleep(protocol.cooldown_seconds)
        for n, i in enumerate(found):
            progress(n, len(found), f"{model.name}, again")
            replaced.append(kept[i])
            kept[i] = bench.run(job, i)
        found = faults(kept, protocol)
    return bench.measurement(job, kept, replaced, _verdict(found, len(kept), "processes"))


def a_first(pair: int) -> bool:
    """Whether a runs before b in this pair: A B, B A, A B ... so that a steady drift favours neither."""
    return pair % 2 == 0


def compare(
    device: Device,
    a: Path,
    b: Path,
    protocol: Protocol = STANDARD,
    progress: Progress = _silent,
    *,
    runtime: str | None = None,
    threads: int = 1,
    cpus: Sequence[int] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> Comparison:
    """Time two models in interleaved pairs of fresh processes; `runtime` is for both, by suffix when None.

    Drift between pairs cancels in the ratio; a pair within which the device changed speed is run again, whole.
    Raises as `measure` does.
    """
    bench = _bench(device, protocol, threads, cpus)
    jobs = bench.job(a, runtime), bench.job(b, runtime)

    def run_pair(i: int) -> tuple[Process, Process]:
        if a_first(i):
            first = bench.run(jobs[0], i)
            return first, bench.run(jobs[1], i)
        first = bench.run(jobs[1], i)
        return bench.run(jobs[0], i), first

    total = protocol.processes
    kept: list[tuple[Process, Process]] = []
    for i in range(total):
        progress(i, total, f"{a.name} against {b.name}, {jobs[0].runtime}")
        kept.append(run_pair(i))
    replaced: list[tuple[Process, Process]] = []

    def found() -> dict[int, tuple[Verdict, str]]:
        checked = ((i, pair_fault(*pair, protocol)) for i, pair in enumerate(kept))
        return {i: wrong for i, wrong in checked if wrong}

    wrong = found()
    for _ in range(protocol.retries):
        if not wrong:
            break
        sleep(protocol.cooldown_seconds)
        for n, i in enumerate(wrong):
            progress(n, len(wrong), "disturbed pairs again")
            replaced.append(kept[i])
            kept[i] = run_pair(i)
        wrong = found()
    sides = []
    for side, job in enumerate(jobs):
        processes = [pair[side] for pair in kept]
        verdict = _verdict(faults(processes, protocol), total, "processes")
        sides.append(bench.measurement(job, processes, [pair[side] for pair in replaced], verdict))
    return Comparison(sides[0], sides[1], tuple(wrong), *pairs_verdict(wrong, total))
