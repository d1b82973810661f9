"""Devices that time by a program of their runtime's makers: Google's benchmark_model, NVIDIA's trtexec.

Where a board or phone has no Python with numpy, its device file names the program, and xedge runs it in place of the
agent: fresh processes all the same, in the same order. Less is then known. benchmark_model prints aggregates, so one
number stands for each process and no percentile is bounded; neither program runs xedge's probe or says when it came to
rest, so that throttling shows only in clocks, governors and cooling before and after.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xedge.audit_parsers import parse_profile
from xedge.errors import DeviceError, UnsupportedGraph, UsageError
from xedge.measurement import Process
from xedge.transports.base import Completed, Transport

SUFFIXES = {"benchmark_model": ".tflite", "trtexec": ".onnx"}
"""Program -> the files that it times."""

_STATE = """
for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor \
/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_max_freq /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq \
/sys/class/thermal/thermal_zone*/temp /sys/class/thermal/cooling_device*/cur_state /sys/class/power_supply/*/capacity
do [ -r "$f" ] && echo "$f $(cat "$f" 2>/dev/null)"; done; exit 0
"""
"""No word of it comes from outside."""


def state(transport: Transport) -> dict[str, Any]:
    """What can change a time, as far as the device tells, under the agent's names."""
    found: dict[str, Any] = {"governors": [], "khz": {}, "khz_limit": {}, "celsius": {}, "cooling": {}, "battery": {}}
    for line in transport.run(["sh", "-c", _STATE], 30.0).stdout.splitlines():
        path, _, value = line.partition(" ")
        parts = path.split("/")
        if len(parts) < 3 or not value:
            continue
        last, above = parts[-1], parts[-2]
        if last == "scaling_governor":
            found["governors"] = sorted({*found["governors"], value})
        elif value.lstrip("-").isdecimal():
            number = int(value)
            kinds = {"scaling_max_freq": ("khz_limit", parts[-3]), "scaling_cur_freq": ("khz", parts[-3])}
            kinds |= {"cur_state": ("cooling", above), "capacity": ("battery", above)}
            if last in kinds:
                key, name = kinds[last]
                found[key][name] = number
            elif last == "temp" and number > -100000:  # some boards report -256 degrees for "no reading"
                found["celsius"][above] = number / 1000
    return found


def sha256_there(transport: Transport, program: str) -> str:
    """Of the program; DeviceError where it is not there."""
    done = transport.run(["sha256sum", program], 120.0)
    digest = (done.stdout.split() or [""])[0]
    if done.exit_code or not re.fullmatch("[0-9a-f]{64}", digest):
        raise DeviceError("there is no such program on the device", where=program, fix="see its device file")
    return digest


# -- benchmark_model -------------------------------------------------------------------------------------------------


def benchmark_model(
    program: str, model: str, threads: int, seconds: float, runs: int, warmup: float, cap: float, cpus: Sequence[int]
) -> list[str]:
    """The call, every setting explicit: the defaults of its versions differ. The CPU's delegate alone, no profiling."""
    pin = ["taskset", f"{sum(1 << core for core in cpus):x}"] if cpus else []
    flags = {
        "graph": model, "num_threads": threads, "num_runs": runs, "min_secs": seconds, "max_secs": cap,
        "warmup_runs": 1, "warmup_min_secs": warmup, "use_xnnpack": "true", "use_gpu": "false", "use_nnapi": "false",
        "enable_op_profiling": "false", "report_peak_memory_footprint": "false",
    }  # fmt: skip
    return [*pin, program, *(f"--{name}={value}" for name, value in flags.items())]


_COUNTED = re.compile(
    r"\bcount=(\d+) (?:first=[\d.e+]+ )?(?:curr=[\d.e+]+ )?min=([\d.e+]+) max=([\d.e+]+) avg=([\d.e+]+)(.*)"
)
_TOTAL = re.compile(r"timings in us:.*?Init: ([\d.e+]+), First inference: ([\d.e+]+),.*Inference \(avg\): ([\d.e+]+)")
_RERUN = "run it again, and see what it prints by hand"


def read_benchmark_model(done: Completed, where: str) -> dict[str, Any]:
    """Its aggregates, in nanoseconds: statistic (``median`` where this version prints it, else ``mean``), ns, count,
    min_ns, max_ns, first_ns, and how many nodes a delegate took.

    Raises:
        UnsupportedGraph: it refused the model. DeviceError: cut off, or something else.
    """
    text = f"{done.stdout}\n{done.stderr}"  # its log goes to either, by version
    if done.exit_code:
        said = [line for line in text.splitlines() if "ERROR" in line or "rror:" in line] or text.strip().splitlines()
        last = said[-1].strip() if said else f"exit code {done.exit_code}"
        if done.exit_code < 0:
            raise DeviceError(f"benchmark_model was ended by signal {-done.exit_code}", where=where)
        raise UnsupportedGraph(f"benchmark_model fails: {last}", where=where)
    counted, total = _COUNTED.findall(text), _TOTAL.search(text)
    if not counted or total is None:
        raise DeviceError("benchmark_model's output breaks off before its timings", where=where, fix=_RERUN)
    count, least, most, mean, more = counted[-1]  # the first is of the warm-up
    median = re.search(r"\bmedian=([\d.e+]+)", more)
    try:
        us = [float(v) for v in (median[1] if median else mean, least, most, total[2], total[3])]
    except ValueError:
        raise DeviceError("benchmark_model's times are no times", where=where, fix=_RERUN) from None
    if not all(math.isfinite(v) and v > 0 for v in us) or not us[1] <= us[0] <= us[2] or int(count) < 1:
        raise DeviceError("benchmark_model's times are no times", where=where, fix=_RERUN)
    if abs(float(mean) - us[4]) > 0.01 * us[4] + 1:
        raise DeviceError("benchmark_model's two averages differ: lines are missing", where=where, fix=_RERUN)
    try:
        log = parse_profile(text, where).delegations
    except UsageError as error:
        raise DeviceError(error.what, where=where, fix=_RERUN) from error
    return {
        "statistic": "median" if median else "mean", "ns": 1000 * us[0], "count": int(count), "min_ns": 1000 * us[1],
        "max_ns": 1000 * us[2], "first_ns": 1000 * us[3],
        "delegated": [[d.delegate, d.nodes, d.total, d.partitions] for d in log],
    }  # fmt: skip


# -- trtexec ---------------------------------------------------------------------------------------------------------


def trtexec_version(transport: Transport, program: str) -> tuple[int, str]:
    """(major, as its banner says). DeviceError where it is absent or says nothing that is known."""
    done = transport.run([program, "--help"], 120.0)
    found = re.search(r"\[TensorRT v(\d+)\]", done.stdout + done.stderr)
    number = found[1] if found else ""
    if len(number) == 4:  # 8502 is 8.5.2
        return int(number[0]), f"{number[0]}.{number[1]}.{int(number[2:])}"
    if len(number) in (5, 6):  # 100300 is 10.3.0
        n = int(number)
        return n // 10000, f"{n // 10000}.{n // 100 % 100}.{n % 100}"
    raise DeviceError(
        "its --help names no version of TensorRT that xedge knows", where=program, fix="see its device file"
    )


def read_times(text: str, warmup_ms: float, where: str) -> tuple[int, ...]:
    """Nanoseconds of each run, from the JSON of trtexec --exportTimes: ``latencyMs``, which is transfers and compute.

    Versions that also write endToEndMs write the warm-up as well; it is left out by its start.

    Raises:
        DeviceError: cut off, garbage, or nothing after the warm-up.
    """
    try:
        rows = json.loads(text)
        ends = any("endToEndMs" in row for row in rows)
        times = [row["latencyMs"] for row in rows if not ends or row["startComputeMs"] >= warmup_ms]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DeviceError("what trtexec --exportTimes wrote is not whole", where=where, fix="run it again") from error
    if not times or not all(isinstance(t, int | float) and math.isfinite(t) and t > 0 for t in times):
        raise DeviceError("trtexec's times are no times", where=where, fix="run it again")
    return tuple(round(1e6 * t) for t in times)


def process(
    runs: tuple[int, ...], summary: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> Process:
    """A process of either program: without warm-up, probes, and (benchmark_model) single runs."""
    first = (round(summary["first_ns"]),) if "first_ns" in summary else ()
    return Process(first, runs, 1, True, (), (), before, after, summary)
