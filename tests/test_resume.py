"""Kill -9 at any moment, run again: it goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from xedge.run import digest_file

if TYPE_CHECKING:
    from tiny_runs import Started, Xedge

pytest_plugins = ["tiny_runs"]

TIMED = {"prune", "seals", "run.json", "verify.json", "report.json", "report.html", "bench.jsonl", ".lock"}


def results(folder: Path) -> dict[str, str]:
    """Digests of all that a run makes, apart from what holds dates, seconds or the folder's own name."""
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {
        str(n): digest_file(folder / n) for n in names if n.parts[0] not in {"prune", "seals"} and str(n) not in TIMED
    }


def without_seconds(value: Any) -> Any:
    """JSON without its measured times."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in ("seconds", "created")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def same(folder: Path, finished: Path) -> None:
    """Both runs ended alike, to the last bit."""
    assert results(folder) == results(finished)
    assert {p.name for p in (folder / "seals").iterdir()} == {p.name for p in (finished / "seals").iterdir()}
    prunes = {p.name for p in (finished / "prune").iterdir()}
    assert {p.name for p in (folder / "prune").iterdir()} == prunes
    for name in prunes:
        a, b = folder / "prune" / name, finished / "prune" / name
        if a.suffix == ".json":
            assert without_seconds(json.loads(a.read_text())) == without_seconds(json.loads(b.read_text()))
        else:
            one, other = load_file(a), load_file(b)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[k], other[k]) for k in one)
    verified = [json.loads((f / "verify.json").read_text()) for f in (folder, finished)]
    assert verified[0] == verified[1]
    hidden = {p.name for p in folder.rglob(".*")} - {".lock"}
    assert not hidden, "temporary files or checkpoints are left"


def test_killed_at_every_step_boundary(xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    seals, kills = folder / "seals", 0
    while True:
        before = set(os.listdir(seals)) if seals.exists() else set()
        started = xedge.start(*arguments, "-o", folder)

        def sealed(before: set[str] = before) -> bool:
            return seals.exists() and any(n not in before for n in os.listdir(seals) if n[0] != ".")

        if not started.reaches(sealed):
            break
        started.kill()
        kills += 1
        assert kills < 40
        kept = {n for n in os.listdir(seals) if n[0] != "."}
        assert kept > before, "a finished step was lost"
    ended = started.wait()
    assert ended.code == 0, ended.err
    assert "epoch" not in ended.err, "nothing was left to train"
    assert kills >= 10
    same(folder, finished)


def spoken(started: Started) -> set[str]:
    """Lines of progress, without their times."""
    log = started.log.with_suffix(".err")
    text = log.read_text() if log.exists() else ""
    return {re.sub(r"^\[.*?\] ", "", line) for line in text.splitlines() if line.startswith("[")}


def test_killed_in_the_middle_of_steps(xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path) -> None:
    """Each line of progress that was not seen before is a moment to kill at: all come from the middle of a step."""
    folder, seen = tmp_path / "run", set[str]()
    for _ in range(60):
        started = xedge.start(*arguments, "-o", folder)
        if not started.reaches(lambda s=started, old=frozenset(seen): bool(spoken(s) - old)):
            break
        started.kill()
        seen |= spoken(started)
    ended = started.wait()
    assert ended.code == 0, ended.err
    assert {line.split(":")[0].strip() for line in seen} > {"iteration 1", "iteration 2", "android", "jetson-orin-nano"}
    same(folder, finished)


def temporary(folder: Path) -> set[str]:
    """Names that are being written now."""
    try:
        return {p.name.split(".tmp")[0].rpartition(".")[0] for p in folder.rglob(".*.tmp*")}
    except FileNotFoundError:  # not there yet, or moved away while we looked
        return set()


def test_killed_while_a_file_is_half_written(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    folder, seen = tmp_path / "run", set[str]()
    for _ in range(12):
        started = xedge.start(*arguments, "-o", folder)
        if not started.reaches(lambda old=frozenset(seen): bool(temporary(folder) - old)):
            break
        started.kill()
        seen |= temporary(folder)
    assert xedge(*arguments, "-o", folder).code == 0
    assert len(seen) >= 2, "the temporary files were too quick to be seen"
    same(folder, finished)


@pytest.mark.parametrize("spoiled", ["prune/001.safetensors", "scales.safetensors", "targets/android"])
def test_a_spoiled_file_is_made_again(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path, spoiled: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / spoiled
    with (next(file.glob("*.tflite")) if file.is_dir() else file).open("r+b") as f:
        f.seek(-3, os.SEEK_END)
        f.write(b"\0\1\2")
    assert xedge(*arguments, "-o", folder).code == 0
    same(folder, finished)


def test_an_unfinished_run_says_how_to_go_on(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    """In one line, and what that line prints is run as it stands."""
    folder = tmp_path / "my  run; $(x)"
    started = xedge.start(*arguments, "-o", folder)
    assert started.reaches((folder / "seals" / "groups.json.json").exists)
    started.kill()
    picture = tmp_path / "in.png"
    printed = set()
    for command, *words in (
        ["diagnose"], ["report"], ["bench"], ["audit"], ["gate", "--max-drop", "1%"],
        ["upscale", picture, "-o", tmp_path / "out.png"],
    ):  # fmt: skip
        ended = xedge(command, folder, *words)
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended
        said, _, go_on = ended.err.strip().partition("; go on: ")
        assert said.startswith(f"xedge: {folder}: the run ")
        printed.add(go_on)
    (line,) = printed
    again = xedge(*shlex.split(line)[1:], "--no-bench", "--quiet")
    assert again.code == 0, again.err
    same(folder, finished)
    assert shlex.split(json.loads((folder / "report.json").read_text())["commands"][1][1])[2] == str(folder)
    (folder / "report.json").write_text("{")
    assert xedge("report", folder).err.strip().endswith(f"; make it again: {line}")


def test_training_killed_between_epochs_goes_on_from_its_checkpoint(xedge: Xedge, tmp_path: Path) -> None:
    """The first time by the real command, in a process that shares nothing with ours."""
    words = ["compress", "-d", "digits", "--base-epochs", "3", "--target", "host-cpu", "--no-bench", "-o"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    checkpoint, log = killed / ".original.checkpoint.safetensors", tmp_path / "log"
    with (
        log.open("w") as err,
        subprocess.Popen(
            [sys.executable, "-m", "xedge.cli", *words, str(killed)],
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        ) as process,
    ):
        end = time.monotonic() + 90
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
    assert "epoch 1 of 3" in log.read_text()
    assert checkpoint.exists()
    assert not (killed / "original.safetensors").exists()
    said = {}
    for folder in (killed, whole):
        started = xedge.start(*words, folder)
        assert started.reaches((folder / "seals" / "original.safetensors.json").exists)
        started.kill()
        said[folder] = " ".join(spoken(started))
    assert "epoch 1 of 3" not in said[killed]
    assert "epoch 3 of 3" in said[killed]
    assert "epoch 1 of 3" in said[whole]
    assert digest_file(killed / "original.safetensors") == digest_file(whole / "original.safetensors")
    assert not checkpoint.exists()


def test_ctrl_c_is_one_line_and_the_run_goes_on(
    xedge: Xedge, arguments: list[str], finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = xedge.start(*arguments, "--quiet", "-o", folder)
    assert started.reaches((folder / "prune" / "001.json").exists)
    assert started.process.pid is not None
    os.kill(started.process.pid, signal.SIGINT)
    ended = started.wait()
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.strip() == "xedge: stopped; run the same command again to go on"  # click ends the line of ^C
    assert not (folder / "report.json").exists()
    assert xedge("compress", "--resume", "--no-bench", "-o", folder).code == 0
    same(folder, finished)
