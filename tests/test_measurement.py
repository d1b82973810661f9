"""Figures made from a measurement, the gate, and the file that keeps the records."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from injected_times import process, record

from xedge.errors import UsageError
from xedge.measurement import Comparison, Measurement, append_measurement, from_json, gate, read_measurements, to_json

# ----------------------------------------------------------------------------------------- figures and the gate


def test_figures_are_made_from_the_medians_of_processes() -> None:
    m = record([5.0, 1, 2, 3, 4, 6, 7])
    assert (m.interval.median, m.interval.lower, m.interval.upper) == (4, 1, 7)
    assert m.first_ms == 12
    p90 = m.quantile(0.9)
    assert p90 is not None
    assert p90.median == 4
    assert m.quantile(0.99) is None  # 100 runs cannot bound it
    assert record([1.0] * 7, processes=tuple(process(1, 662) for _ in range(7))).quantile(0.99) is not None


@pytest.mark.parametrize(
    ("budget", "verdict", "decision"),
    [(8.0, "ok", "pass"), (0.5, "ok", "fail"), (4.0, "ok", "inconclusive"), (8.0, "throttled", "invalid")],
)
def test_the_gate(budget: float, verdict: str, decision: str) -> None:
    assert gate(record([1.0, 2, 3, 4, 5, 6, 7], verdict=verdict), budget) == decision


@pytest.mark.parametrize("kind", ["emulated", "fake", "browser"])
def test_the_gate_takes_real_devices_only(kind: str) -> None:
    with pytest.raises(UsageError, match="real device"):
        gate(record([1.0] * 7, device_kind=kind), 30)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_the_gate_wants_a_budget(budget: float) -> None:
    with pytest.raises(UsageError):
        gate(record([1.0] * 7), budget)


# ------------------------------------------------------------------------------------------------------- the file


def comparison() -> Comparison:
    return Comparison(record([1.0, 2.0]), record([3.0, 4.0], replaced=(process(),)), (1,), "ok", "why")


def test_records_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    records: list[Measurement | Comparison] = [record([1.5, 2.5]), comparison(), record([3.0])]
    assert read_measurements(path) == []
    for one in records:
        append_measurement(path, one)
        assert from_json(json.loads(json.dumps(to_json(one)))) == one
    assert read_measurements(path) == records


def test_every_torn_end_is_forgiven_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    append_measurement(path, record([1.0]))
    whole = path.read_bytes()
    append_measurement(path, record([2.0]))
    both = path.read_bytes()
    for end in range(len(whole), len(both), 97):
        path.write_bytes(both[:end])
        assert read_measurements(path) == [record([1.0])]
        append_measurement(path, record([3.0]))
        assert read_measurements(path) == [record([1.0]), record([3.0])]


def test_a_torn_first_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_bytes(b"x" * 200_000)
    assert read_measurements(path) == []
    append_measurement(path, record([1.0]))
    assert read_measurements(path) == [record([1.0])]


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"record": "Poem"}', "[1]", '{"record": "Measurement"}'])
def test_damage_in_the_middle_is_said_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bench.jsonl"
    append_measurement(path, record([1.0]))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match="line 2 is damaged"):
        read_measurements(path)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_no_space_leaves_the_file_as_it_was(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    path = tmp_path / "bench.jsonl"
    append_measurement(path, record([1.0]))
    before = path.read_bytes()
    small_files(len(before) + 1000)
    with pytest.raises(UsageError, match=r"bench\.jsonl: cannot write"):
        append_measurement(path, record([2.0]))
    assert path.read_bytes() == before


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(to_json(record([0.5]))) + "\n")
    code = (
        "import sys; from pathlib import Path; from xedge.measurement import *\n"
        "path = Path(sys.argv[1]); one = read_measurements(path)[0]\n"
        "for _ in range(20): append_measurement(path, one)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert read_measurements(path) == [record([0.5])] * 61
