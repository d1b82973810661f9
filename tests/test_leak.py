"""Calibration, ranking and allocation read training data; validation data is for the report alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny

from xedge.run import digest_file

if TYPE_CHECKING:
    from tiny_runs import Xedge

pytest_plugins = ["tiny_runs"]

CLOSED = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
import tiny

class Closed:
    '''Opens for one look at the first image, which checks its shape.'''
    def __init__(self, inner): self.inner, self.looks = inner, 0
    def __len__(self): return len(self.inner)
    def __getitem__(self, i):
        self.looks += 1
        if i != 0 or self.looks > 1: raise PermissionError('validation data were read')
        return self.inner[i]

def data():
    whole = tiny.data()
    return dataclasses.replace(whole, {split}=Closed(whole.{split}))
"""


def tree(folder: Path) -> dict[str, str]:
    """Digests of everything that follows from the choices, the training and the calibration."""
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    apart = {"seals", "prune", "run.json", "verify.json", "report.json", "report.html", ".lock"}
    return {str(f): digest_file(folder / f) for f in files if f.parts[0] not in apart}


def choices(folder: Path) -> list[dict[str, object]]:
    """What each iteration measured and decided, without its seconds."""
    plans = [json.loads(p.read_text()) for p in sorted((folder / "prune").glob("*.json"))]
    return [{k: v for k, v in p.items() if k != "seconds"} for p in plans]


def test_other_validation_data_change_the_report_alone(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    words = [f"{tiny.DATA}?val=noise" if w == tiny.DATA else w for w in arguments]
    assert words != arguments
    ended = xedge(*words, "-o", other)
    assert ended.code == 0, ended.err
    assert tree(other) == tree(finished)
    assert {"plan.json", "model.safetensors", "scales.safetensors"} < set(tree(other))
    assert sum(name.endswith((".onnx", ".tflite")) for name in tree(other)) >= 6
    assert choices(other) == choices(finished)
    one, two = (json.loads((f / "verify.json").read_text()) for f in (finished, other))
    assert one["original"]["top1"] > 0.7 > two["original"]["top1"], "the validation data did not differ"


def closed(folder: Path, split: str) -> str:
    file = folder / "closed.py"
    file.write_text(CLOSED.format(tests=str(tiny.HERE.parent), split=split))
    return f"{file}:data"


def test_nothing_reads_validation_data_before_verification(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [closed(tmp_path, "val") if w == tiny.DATA else w for w in arguments]
    ended = xedge(*words, "--quiet", "-o", folder)
    assert ended.code == 2
    assert re.search(r"val(\[0\])?: raised PermissionError: validation data were read", ended.err), ended.err
    assert ended.err.count("\n") == 1
    assert tree(folder) == tree(finished)  # all was made by then
    assert not (folder / "verify.json").exists()
    assert not (folder / "report.json").exists()


@pytest.mark.parametrize("split", ["train", "select"])
def test_the_closed_data_close(xedge: Xedge, arguments: list[str], tmp_path: Path, split: str) -> None:
    """The test above can fail: the other two splits are read, and early."""
    words = [closed(tmp_path, split) if w == tiny.DATA else w for w in arguments]
    ended = xedge(*words, "--quiet", "-o", tmp_path / "run")
    assert ended.code == 2
    assert f"{split}" in ended.err
    assert not (tmp_path / "run" / "prune" / "001.safetensors").exists()


def test_a_dry_run_reads_no_validation_data(xedge: Xedge, arguments: list[str], tmp_path: Path) -> None:
    words = [closed(tmp_path, "val") if w == tiny.DATA else w for w in arguments]
    ended = xedge(*words, "--dry-run", "--quiet")
    assert ended.code == 0, ended.err


def test_the_baseline_is_trained_without_validation_data(xedge: Xedge, tmp_path: Path) -> None:
    """A built-in model that comes without weights: its training and its test against chance read no `val`."""
    source = Path(closed(tmp_path, "val").rpartition(":")[0])
    source.write_text(
        source.read_text() + "\nfrom xedge.load import load_data\n"
        "def digits():\n"
        "    whole = load_data('digits?limit=600', root=None, seed=0)\n"
        "    return dataclasses.replace(whole, val=Closed(whole.val))\n"
    )
    folder = tmp_path / "run"
    words = ["-d", f"{source}:digits", "--base-epochs", "3", "--batch", "32", "--no-bench", "--target", "host-cpu"]
    started = xedge.start("compress", *words, "-o", folder)
    assert started.reaches((folder / "seals" / "groups.json.json").exists), started.wait().err
    started.kill()
