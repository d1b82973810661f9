"""What LiteRT's benchmark_model says: its log, in the forms of TensorFlow 2.10 to 2.17, and its profiling CSV."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from audit_nets import files, table

from xedge import audit as audits
from xedge.audit import audit_one
from xedge.audit_flatbuffer import read_tflite
from xedge.audit_parsers import parse_profile
from xedge.errors import UsageError

__all__ = ["files", "table"]
HEAD = (
    "INFO: STARTING!\nINFO: Log parameter values verbosely: [0]\nINFO: Graph: [net.tflite]\n"
    "INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n"
)
TIMES = (
    "INFO: count=50 first=1411 curr=1409 min=1400 max=1951 avg=1455.28 std=135\n"
    "INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 13764.3, "
    "Inference (avg): 13520.2\n"
)


def replacing(done: int, of: int | None, delegate: str = "TfLiteXNNPackDelegate", parts: int = 1) -> str:
    total = "" if of is None else f" out of {of}"
    return (
        f"INFO: Replacing {done}{total} node(s) with delegate ({delegate}) node, yielding {parts} partitions "
        "for subgraph 0.\n"
    )


def table_of(rows: list[tuple[str, str]]) -> str:
    head = "\t             [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]\n"
    line = "\t{:>24}\t    0.057\t    0.057\t  5.668%\t 56.668%\t     0.000\t        1\t{}\n"
    setup = [("ModifyGraphWithDelegate", "ModifyGraphWithDelegate/0"), ("AllocateTensors", "AllocateTensors/0")]
    rule = "============================== {} ==============================\n"
    first, second = ("".join(line.format(*r) for r in part) for part in (setup, rows))
    return (
        f"Profiling Info for Benchmark Initialization:\n{rule.format('Run Order')}{head}{first}\n"
        f"{rule.format('Top by Computation Time')}{head}{first}\n"
        f"Operator-wise Profiling Info for Regular Benchmark Runs:\n{rule.format('Run Order')}{head}{second}\n"
        f"{rule.format('Top by Computation Time')}{head}{second}\nNumber of nodes executed: {len(rows)}\n"
    )


def csv_of(rows: list[tuple[str, str]], start: bool = True) -> str:
    columns = "node type, start, first" if start else "node type, first"
    numbers = "0.150559, 0.03" if start else "0.03"
    body = "".join(f"{kind}, {numbers}, 0.0309657, 14.9436%, 87.5027%, 0, 1, {name}\n" for kind, name in rows)
    return (
        "Operator-wise Profiling Info for Regular Benchmark Runs:\n"
        "============================== Run Order ==============================\n"
        f"{columns}, avg_ms, %, cdf%, mem KB, times called, name\n{body}\n"
        f"Number of nodes executed: {len(rows)}\n"
    )


def audited(path: Path, folder: Path, text: str) -> audits.Audit:
    (folder / "log.txt").write_text(text)
    return audit_one(path, profile=folder / "log.txt")


def test_a_whole_delegation(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    found = audited(files["tflite"], tmp_path, HEAD + replacing(n, n) + TIMES)
    assert found.delegated == f"{n} of {n} operators by TfLiteXNNPackDelegate in 1 partitions"
    assert {(x.executed, x.kernel) for x in found.layers} == {("int8", "TfLiteXNNPackDelegate")}
    assert found.notes == ()


def test_logcat_and_old_lines_are_read(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    prefix = "07-14 13:23:08.148 25289 25289 I tflite  : "
    text = (HEAD + replacing(n, n) + TIMES).replace("INFO: ", prefix)
    assert audited(files["tflite"], tmp_path, text).delegated is not None
    old = audited(files["tflite"], tmp_path, HEAD + replacing(3, None) + TIMES)
    assert old.delegated == "3 operators by TfLiteXNNPackDelegate in 1 partitions"
    assert "which operators were refused" in old.notes[0]
    ancient = "Average inference timings in us: Warmup: 76605.9, Init: 9933, no stats: 66767.6\n"
    none = audited(files["tflite"], tmp_path, "STARTING!\nbenchmark_model\n" + ancient)
    assert none.delegated is None
    assert {x.kernel for x in none.layers} == {"LiteRT's own kernel"}


@pytest.mark.parametrize("form", ["table", "csv", "csv without start"])
def test_a_refused_operator_is_named(files: dict[str, Path], tmp_path: Path, form: str) -> None:
    reading = read_tflite(files["tflite"])
    grouped = reading.layers[2]
    rows = [("TfLiteXNNPackDelegate", "[pool]:9"), (grouped.op, f"[{grouped.name}]:{grouped.index}")]
    log = HEAD + replacing(reading.operators - 1, reading.operators, parts=2) + TIMES
    profile = table_of(rows) if form == "table" else csv_of(rows, start=form == "csv")
    found = audited(files["tflite"], tmp_path, log + profile)
    assert [x.kernel == "LiteRT's own kernel" for x in found.layers] == [False, False, True, False]
    assert found.layers[2].why == ("TfLiteXNNPackDelegate refused it",)
    assert found.integer_share == 1.0, "refused, and still integer"


def test_kernels_inside_the_delegate(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    names = ["Convolution (NHWC, QC8) IGEMM", "Convolution (NHWC, QC8) IGEMM", "Convolution (NHWC, F32) IGEMM",
             "Fully Connected (NC, QS8) GEMM"]  # fmt: skip
    rows = [(name, f"Delegate/{name}:{i}") for i, name in enumerate(names)]
    found = audited(files["tflite"], tmp_path, HEAD + replacing(n, n) + TIMES + table_of(rows))
    assert [x.executed for x in found.layers] == ["int8", "int8", "float32", "int8"]


def test_the_gpu_delegate_computes_in_floating_point(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    found = audited(files["tflite"], tmp_path, HEAD + replacing(n, n, "TfLiteGpuDelegateV2") + TIMES)
    assert found.integer_share == 0.0
    assert {x.executed for x in found.layers} == {"float16 or float32"}


def test_logs_of_other_models_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    n = read_tflite(files["tflite"]).operators
    for text, said in (
        (HEAD + replacing(539, 548, parts=19) + TIMES, "is of a model with 548 operators"),
        (HEAD + replacing(n + 1, n) + TIMES, "nodes were delegated"),
        (csv_of([("CONV_2D", f"[x]:{n}")]), f"names operator {n}"),
        (csv_of([("SOFTMAX", "[x]:0")]), "says that operator 0 is SOFTMAX; it is CONV_2D"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            audited(files["tflite"], tmp_path, text)


def test_logs_cut_anywhere_are_refused() -> None:
    rows = [("TfLiteXNNPackDelegate", "[pool]:9"), ("CONV_2D", "[a]:3")]
    head = HEAD + replacing(3, 4)
    for end in range(1, len(head) + TIMES.index("Inference (avg)")):
        with pytest.raises(UsageError):
            parse_profile((head + TIMES)[:end], "log")
    for text in (csv_of(rows), csv_of(rows, start=False)):
        for end in range(text.index("cdf%") + 1, text.index("Number of nodes executed")):
            with pytest.raises(UsageError):
                parse_profile(text[:end], "log")
    log = head + TIMES + table_of(rows)
    row = log.rindex("CONV_2D", 0, log.rindex("Top by"))
    for end in range(row + 1, log.index("[a]:3", row), 3):
        with pytest.raises(UsageError, match="cut off"):
            parse_profile(log[:end], "log")
