"""The run folder: steps made once, sealed, redone when anything changed, and never half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from xedge.errors import UsageError
from xedge.run import Run, digest_file, digest_json, explain, read_json, write_atomically, write_json, writing

REQUEST = {"model": "m", "seed": 0}


class Maker:
    """Writes a text, and counts how often it was asked to."""

    def __init__(self, text: str = "made") -> None:
        self.text, self.calls = text, 0

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.write_text(self.text)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(tmp_path / "run", REQUEST) as opened:
        yield opened


def files(folder: Path) -> set[str]:
    """Everything in the folder but its lock."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {".lock"}


def test_a_step_is_made_once_for_the_same_inputs(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("1")
    make = Maker()
    inputs = {"file": source, "number": 3}
    assert run.step("a.txt", inputs, make).read_text() == "made"
    assert run.step("a.txt", dict(reversed(inputs.items())), make).read_text() == "made"
    assert make.calls == 1
    assert run.skipped == ["a.txt"]
    assert run.sealed("a.txt")
    os.utime(source, (0, 0))  # content decides, not the date
    run.step("a.txt", inputs, make)
    assert make.calls == 1


@pytest.mark.parametrize("change", ["input file", "input value", "new input", "output", "output gone", "seal gone"])
def test_a_step_is_made_again_when_anything_changed(run: Run, tmp_path: Path, change: str) -> None:
    source = tmp_path / "source"
    source.write_text("1")
    inputs: dict[str, object] = {"file": source, "number": 3}
    make = Maker()
    out = run.step("sub/a.txt", inputs, make)
    if change == "input file":
        source.write_text("2")
    elif change == "input value":
        inputs["number"] = 3.5
    elif change == "new input":
        inputs["more"] = None
    elif change == "output":
        out.write_text("tampered")
    elif change == "output gone":
        out.unlink()
    else:
        (run.folder / "seals" / "sub--a.txt.json").unlink()
    assert run.step("sub/a.txt", inputs, make).read_text() == "made"
    assert make.calls == 2
    run.step("sub/a.txt", inputs, make)
    assert make.calls == 2


@pytest.mark.parametrize("seal", ["", "{", "[]", '"x"', "\xff\xfe", '{"inputs": {}}'])
def test_a_damaged_seal_is_no_seal(run: Run, seal: str) -> None:
    make = Maker()
    run.step("a.txt", {}, make)
    (run.folder / "seals" / "a.txt.json").write_bytes(seal.encode("latin-1"))
    run.step("a.txt", {}, make)
    assert make.calls == 2


def test_a_crash_between_output_and_seal_makes_the_step_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from xedge import run as module

    def crash(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            run.step("a.txt", {}, Maker("first"))
    assert (run.folder / "a.txt").exists()
    assert not run.sealed("a.txt")
    assert run.step("a.txt", {}, Maker("second")).read_text() == "second"


def test_a_crash_before_the_new_output_leaves_no_old_seal_beside_it(run: Run) -> None:
    run.step("a.txt", {"v": 1}, Maker("one"))

    def crash(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("a.txt", {"v": 2}, crash)
    make = Maker("one again")  # back to the first inputs: the old output is not trusted without its seal
    run.step("a.txt", {"v": 1}, make)
    assert make.calls == 1


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_make_that_raises_leaves_nothing(run: Run, kind: type[BaseException]) -> None:
    before = files(run.folder)

    def half(path: Path) -> None:
        path.write_text("half")
        raise kind

    def half_folder(path: Path) -> None:
        path.mkdir()
        (path / "part").write_text("half")
        raise kind

    for make in (half, half_folder):
        with pytest.raises(kind):
            run.step("a", {}, make)
    assert files(run.folder) == before
    assert not run.sealed("a")


def test_a_folder_is_a_step_too(run: Run) -> None:
    def make(names: tuple[str, ...]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.mkdir()
            for name in names:
                (path / name).write_text(name)

        return write

    folder = run.step("targets/t", {"v": 1}, make(("a", "b")))
    assert {p.name for p in folder.iterdir()} == {"a", "b"}
    run.step("targets/t", {"v": 1}, make(("never",)))
    assert {p.name for p in folder.iterdir()} == {"a", "b"}
    (folder / "b").write_text("tampered")
    run.step("targets/t", {"v": 1}, make(("c",)))
    assert {p.name for p in folder.iterdir()} == {"c"}  # the old folder is gone as a whole
    assert files(run.folder) == {"run.json", "seals/targets--t.json", "targets/t/c"}


def test_what_is_written_replaces_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    seen = []

    def make(tmp: Path) -> None:
        tmp.write_text("new")
        seen.append(path.read_text())  # a reader at this moment sees the old one

    write_atomically(path, make)
    assert seen == ["old"]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8))
def test_json_digests_know_values_and_not_the_order_of_keys(value: object) -> None:
    assert digest_json(value) == digest_json(json.loads(json.dumps(value)))
    assert digest_json({"a": value, "b": 1}) == digest_json({"b": 1, "a": value})
    assert digest_json({"a": value}) != digest_json({"a": [value]})


def test_a_folders_digest_knows_names_and_contents(tmp_path: Path) -> None:
    def tree(name: str, contents: dict[str, str]) -> str:
        for file, text in contents.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return digest_file(tmp_path / name)

    one = tree("1", {"a": "x", "sub/b": "y"})
    assert one == tree("2", {"sub/b": "y", "a": "x"})
    assert len({one, tree("3", {"a": "y", "sub/b": "x"}), tree("4", {"a": "x", "sub/c": "y"})}) == 3


def test_another_request_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    with Run.open(tmp_path, REQUEST) as run:
        run.step("a.txt", {}, Maker())
    before = {p: (tmp_path / p).read_bytes() for p in files(tmp_path)}
    with pytest.raises(UsageError) as caught:
        Run.open(tmp_path, {"model": "m", "seed": 7, "new": [1]})
    assert "seed was 0 and now is 7" in str(caught.value)
    assert "new was None and now is [1]" in str(caught.value)
    assert "model" not in caught.value.what
    assert {p: (tmp_path / p).read_bytes() for p in files(tmp_path)} == before
    Run.open(tmp_path, REQUEST).close()  # and the refusal holds no lock


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_damaged_request_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"run\.json"):
        Run.open(tmp_path, REQUEST)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="no run folder"):
        Run.open(tmp_path, REQUEST)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_is_locked_out_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from xedge.run import Run\n"
        f"run = Run.open(pathlib.Path(sys.argv[1]), {REQUEST!r}); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another xedge is at work here"):
            Run.open(tmp_path, REQUEST)
        other.kill()
        other.wait()
    Run.open(tmp_path, REQUEST).close()


def test_what_a_killed_process_left_half_written_is_cleaned(tmp_path: Path) -> None:
    Run.open(tmp_path, REQUEST).close()
    for folder in (".targets/t", "targets/.t.11.tmp", "targets/.t.11.old", ".original.tflite.11.tmp.folder", "prune"):
        (tmp_path / folder).mkdir(parents=True)
    ours = {
        ".model.safetensors.11.tmp", "seals/.model.json.11.tmp", "targets/.t.11.tmp/half", "targets/.t.11.old/old",
        ".original.tflite.11.tmp.folder/half", "prune/..001.checkpoint.safetensors.11.tmp",
    }  # fmt: skip
    others = {"notes.tmp", ".hidden", "prune/.001.checkpoint.safetensors", ".targets/t/kept"}
    (tmp_path / "seals").mkdir()
    for name in ours | others:
        (tmp_path / name).write_text("x")
    Run.open(tmp_path, REQUEST).close()
    assert files(tmp_path) == others | {"run.json"}


# -- what the file system says ----------------------------------------------------------------------------------------


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="cannot write") as caught:
            Run.open(folder, REQUEST)
        assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="too long"):
        Run.open(tmp_path / ("x" * 300), REQUEST)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here; RLIMIT_FSIZE stands in below")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_disk_is_one_line(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UsageError, match=r"Read-only file system.*-o"):
        Run.open(disk / "run", REQUEST)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match=r"Permission denied.*-o"):
        Run.open(tmp_path / "run", REQUEST)


def _save_tensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(300_000)}, path)


def _save_onnx(path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    zeros = numpy_helper.from_array(np.zeros(300_000, np.float32), "w")
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [zeros])), path)


def _save_text(path: Path) -> None:
    path.write_text("x" * 1_200_000)


def _save_folder(path: Path) -> None:
    path.mkdir()
    (path / "small").write_text("x")
    (path / "large").write_bytes(b"x" * 1_200_000)


@pytest.mark.parametrize("make", [_save_tensors, _save_onnx, _save_text, _save_folder])
def test_a_full_disk_is_one_line_and_the_run_goes_on_after(disk: Path, make: Callable[[Path], None]) -> None:
    with Run.open(disk / "run", REQUEST) as run:
        run.step("first", {}, Maker())
        before = files(run.folder)
        with pytest.raises(UsageError, match="No space left on device; free some space") as caught:
            run.step("second", {}, make)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        assert files(run.folder) == before
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    with Run.open(disk / "run", REQUEST) as run:
        run.step("first", {}, Maker())
        run.step("second", {}, make)
        assert run.skipped == ["first"]


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Run.open(tmp_path / "run", REQUEST) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            for make in (_save_text, _save_tensors):
                with pytest.raises(UsageError, match="File too large; free some space"):
                    run.step("second", {}, make)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert files(run.folder) == {"run.json"}
        run.step("second", {}, _save_text)


def test_only_what_the_file_system_says_about_writing_is_explained(tmp_path: Path) -> None:
    inside, outside = tmp_path / "run" / "a", tmp_path / "pictures" / "1.png"

    def said(number: int, path: Path) -> str | None:
        explained = explain(OSError(number, "", str(path)), tmp_path / "run")
        return None if explained is None else str(explained)

    assert (
        said(errno.EACCES, inside)
        == f"{inside}: cannot write: Permission denied; choose a folder you may write with -o"
    )
    assert said(errno.EACCES, outside) == f"{outside}: Permission denied; check who may read and write it"
    assert said(errno.ENOENT, inside) is None
    assert explain(SafetensorError("header too small"), tmp_path) is None
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "absent").read_text()


def test_json_on_disk(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None]})
    assert read_json(tmp_path / "a.json") == {"a": [0.1, None], "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(UsageError, match="no such file"):
        read_json(tmp_path / "absent.json")
