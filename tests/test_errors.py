"""Whatever is wrong with the input: one line on stderr, no traceback, the right exit code, nothing half-written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xedge import errors
from xedge.errors import XedgeError, nearest

if TYPE_CHECKING:
    from tiny_runs import Ended, Xedge

pytest_plugins = ["tiny_runs"]

USER = """
import dataclasses, os, sys
sys.path.insert(0, {tests!r})
import tiny, torch
from torch import nn
from xedge.data import Data, Tensors

class Choosy(tiny.Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)
class Raising(tiny.Net):
    def forward(self, x): raise RuntimeError('forward\\nbroke')
class Two(tiny.Net):
    def forward(self, x): return super().forward(x), x
class Exploding(tiny.Net):
    def forward(self, x): return super().forward(x) / 0
class Five(tiny.Net):
    def __init__(self): super().__init__(5)
class Infinite(tiny.Net):
    def __init__(self):
        super().__init__()
        self.head.weight.data[1, 2] = float('inf')
def failing(): return 1 / 0
def replaced(**parts): return dataclasses.replace(tiny.data(), **parts)
def empty(): return replaced(train=Tensors(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)))
def wide(): return replaced(shape=(1, 9, 9))
def large(): return Data(name='large', train=Tensors(torch.zeros(4, 3, 8, 8)), select=Tensors(torch.zeros(4, 3, 8, 8)),
    val=Tensors(torch.zeros(4, 3, 8, 8)), classes=None, shape=(3, 8, 8))
def nan(): return replaced(train=Tensors(torch.full((4, 1, 8, 8), float('nan')), torch.zeros(4, dtype=torch.long)))
def labels(): return replaced(train=Tensors(torch.zeros(4, 1, 8, 8), torch.full((4,), 7)))
class Torn:
    def __len__(self): return 256
    def __getitem__(self, i):
        if i == 200: raise ValueError('image 200 is torn')
        return tiny.data().train[i]
def torn(): return replaced(train=Torn())
def score(group, observed, keep): return observed.no_such_attribute
def short(group, observed, keep): return [1.0]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> dict[str, str]:
    """Files of a user, sound and unsound."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.py").write_text(USER.format(tests=str(tiny.HERE.parent)))
    (folder / "broken.py").write_text("import sys\n\nraise RuntimeError('at import')\n")
    state = load_file(weights)
    nan = {k: v.clone() for k, v in state.items()}
    nan["second.weight"][0, 0] = float("nan")
    save_file(nan, folder / "nan.safetensors")
    save_file({**state, "head.weight": torch.zeros(7, 32), "head.bias": torch.zeros(7)}, folder / "seven.safetensors")
    torch.manual_seed(0)
    save_file(tiny.net().state_dict(), folder / "untrained.safetensors")
    (folder / "torn.safetensors").write_bytes(weights.read_bytes()[:-100])

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(folder / "executed"),))

    torch.save({"head.weight": Bomb()}, folder / "bomb.pt")
    return {"user": f"{folder}/user.py", "folder": str(folder), "net": tiny.NET}


def one_line(ended: Ended, code: int, *parts: str) -> None:
    """One line on stderr, nothing on stdout, no traceback."""
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.startswith("xedge: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    for part in parts:
        assert part in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        ("-m resnet2", 2, "unknown model 'resnet2'; did you mean resnet20"),
        ("-m {folder}/absent.py:net", 2, "absent.py: there is no such file"),
        ("-m {user}:Ned", 2, "has no 'Ned'"),
        ("-m {folder}/broken.py:net", 2, "raised RuntimeError: at import"),
        ("-m {user}:failing", 2, "failing: raised ZeroDivisionError: division by zero"),
        ("-m {user}:Raising", 2, "does not take images of shape (1, 8, 8) (RuntimeError: forward)"),
        ("-m {user}:Two", 2, "its output is tuple, not one tensor"),
        ("-m {user}:Exploding", 2, "its output is NaN or infinity"),
        ("-m {user}:Five --weights=", 2, "the model has 5 outputs and stripes has 4 classes"),
        ("-m {user}:Infinite --weights=", 2, "head.weight holds NaN or infinity"),
        ("-m {net} --weights {folder}/untrained.safetensors", 2, "is chance; check that"),
        ("-d digit", 2, "unknown data 'digit'; did you mean digits"),
        ("-d {user}:failing", 2, "raised ZeroDivisionError"),
        ("-d {user}:empty", 2, "the train split is empty"),
        ("-d {user}:wide", 2, "the image is (1, 8, 8) and Data.shape is (1, 9, 9)"),
        ("-d {user}:large", 2, "does not take images of shape (3, 8, 8)"),
        ("-d {user}:nan", 2, "holds NaN or infinity"),
        ("-d {user}:labels", 2, "the label is 7, not 0..3"),
        ("-d {user}:torn", 2, "train: raised ValueError: image 200 is torn"),
        ("-d npz:{folder}/absent.npz", 2, "absent.npz"),
        ("-d folder:{folder}/absent", 2, "absent"),
        ("-d digits", 2, "not this model's weights"),
        ("--target jetsn", 2, "unknown target 'jetsn'; did you mean jetson"),
        ("--criterion dilos", 2, "unknown criterion 'dilos'; did you mean diloss"),
        ("--criterion {user}:score", 2, "raised AttributeError"),
        ("--criterion {user}:short", 2, "scores"),
        ("--teacher class:9", 2, "stripes has no class '9'"),
        ("--teacher logits --criterion dfdr", 2, "Fisher's ratio compares classes"),
        ("--weights {folder}/absent.safetensors", 2, "absent.safetensors: there is no such file"),
        ("--weights {folder}/nan.safetensors", 2, "second.weight holds NaN or infinity"),
        ("--weights {folder}/seven.safetensors", 2, "not this model's weights"),
        ("--weights {folder}/torn.safetensors", 2, "cannot be read as weights only"),
        ("--weights {folder}/bomb.pt", 2, "cannot be read as weights only"),
        ("--macs 0", 2, "--macs 0 is not a fraction"),
        ("--macs 1.5", 2, "--macs 1.5 is not a fraction"),
        ("--macs nan", 2, "--macs nan"),
        ("--macs many", 2, "neither a fraction nor a percentage"),
        ("--macs 0.02", 2, "the MACs budget of 2.0% cannot be met"),
        ("--max-drop 150%", 2, "--max-drop 1.5"),
        ("--bits 1.5", 2, "--bits 1.5 is outside 2 to 8"),
        ("--epochs -1", 2, "--epochs -1"),
        ("--iterations 0", 2, "--iterations 0"),
        ("--base-epochs 0", 2, "--base-epochs"),
        ("--batch 1", 2, "--batch 1"),
        ("--lr 0", 2, "--lr 0 is not positive"),
        ("--lr 1e30", 2, "loss is no longer finite"),
        ("--seed -1", 2, "--seed"),
        ("--allocation tailor", 2, "there is no --allocation tailor; did you mean taylor"),
        ("--stop energi", 2, "there is no --stop energi; did you mean energy"),
        ("--stop energy", 2, "takes no --macs"),
        ("--step 1", 2, "--step 1 is not between"),
        ("--smoothing 2", 2, "--smoothing 2 is not between"),
        ("--distill -1", 2, "--distill -1 is not between"),
        ("--exclude (", 2, "is no regular expression"),
        ("--no-such-option 1", 2, "No such option"),
        ("--resume", 2, "--resume takes no"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    xedge: Xedge, files: dict[str, str], arguments: list[str], tmp_path: Path, change: str, code: int, line: str
) -> None:
    folder = tmp_path / "run"
    words = [*arguments, "--quiet", "-o", str(folder), *(w.format(**files) for w in change.split())]
    if "--weights=" in words:
        words = [w for i, w in enumerate(words) if w not in ("--weights=", "--weights") and words[i - 1] != "--weights"]
    before = sorted(xedge.folder.iterdir())
    one_line(xedge(*words), code, line)
    assert [p for p in sorted(xedge.folder.iterdir()) if p not in before and not p.name.startswith("log-")] == []
    assert not Path(files["folder"], "executed").exists()
    if folder.exists():  # what was found out only after the first steps: all that is there is whole and sealed
        made = {p.name for p in folder.rglob("*") if p.is_file() and p.parent.name != "seals"}
        sealed = {p.name.removesuffix(".json").rpartition("--")[2] for p in (folder / "seals").glob("*")}
        assert made == sealed | {"run.json", ".lock"}
    later = ("cannot be met", "no longer finite", "scores", "200 is torn", "AttributeError")
    assert folder.exists() == (line.endswith(later) or "is chance" in line)


def test_a_model_that_cannot_be_traced(
    xedge: Xedge, files: dict[str, str], arguments: list[str], tmp_path: Path
) -> None:
    """torch.export prints its graph on stderr before it raises; our line is the last."""
    ended = xedge(*arguments, "--quiet", "-m", f"{files['user']}:Choosy", "-o", tmp_path / "run")
    assert ended.code == 6, ended
    assert ended.out == ""
    last = ended.err.splitlines()[-1]
    assert last.startswith("xedge: Choosy: torch.export cannot trace it")
    assert last.endswith("remove data-dependent control flow from its forward")
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "groups.json").exists()


def test_a_bad_request_in_a_good_folder_changes_nothing(xedge: Xedge, arguments: list[str], finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    one_line(xedge(*arguments, "--seed", "3", "-o", finished), 2, "holds another run (seed was 0 and now is 3)")
    one_line(xedge(*arguments, "-m", "lenet", "-o", finished), 2, "unknown model")
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.parametrize("command", ["bench", "report", "compress --resume -o"])
def test_folders_that_are_no_finished_run(xedge: Xedge, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("absent", "empty", "file"):
        one_line(xedge(*command.split(), tmp_path / name), 2, str(tmp_path / name))
    assert not (tmp_path / "absent").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_a_folder_below_a_file(xedge: Xedge, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    one_line(xedge(*arguments, "--quiet", "-o", tmp_path / "file"), 2, "cannot write", "-o")
    one_line(xedge(*arguments, "--quiet", "-o", tmp_path / "file" / "run"), 2, "cannot write", "-o")


def test_the_command_line_itself(xedge: Xedge) -> None:
    one_line(xedge("compres"), 2, "Did you mean 'compress'")
    one_line(xedge("list", "modells"), 2, "models")
    one_line(xedge("report"), 2, "RUN")
    one_line(xedge("bench", "x", "--protocol", "slow"), 2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=120k", "none", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_after(
    xedge: Xedge, arguments: list[str], finished: Path, disk: Path
) -> None:
    folder = disk / "run"
    (disk / "other").write_bytes(b"x" * 40_000)
    ended = xedge(*arguments, "--quiet", "-o", folder)
    one_line(ended, 2, "No space left on device; free some space")
    assert not list(folder.rglob(".*.tmp*"))
    assert (folder / "seals" / "groups.json.json").exists()
    assert not (folder / "report.json").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
    ended = xedge("compress", "--resume", "--no-bench", "-o", folder)
    assert ended.code == 0, ended.err
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_every_error_is_one_line_with_its_own_code() -> None:
    classes = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, XedgeError)]
    kinds = [k for k in classes if k is not XedgeError]
    assert sorted(k.exit_code for k in kinds) == [1, 2, 3, 4, 5, 6, 7]
    for kind in kinds:
        e = kind("what\n  happened", where="a.py", fix="mend\tit")
        assert str(e) == "a.py: what happened; mend it"
        assert (e.what, e.where, e.fix) == ("what\n  happened", "a.py", "mend\tit")
        assert f"{kind.__name__}" in (errors.__doc__ or "")


@given(st.text(), st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()))
def test_no_text_breaks_the_line(what: str, where: str | None, fix: str | None) -> None:
    assert len(str(XedgeError(what, where=where, fix=fix)).splitlines()) <= 1


@given(st.lists(st.text(min_size=1, alphabet="abc-1"), min_size=1, unique=True), st.text(alphabet="abc-1"))
def test_the_hint_names_what_there_is(known: list[str], name: str) -> None:
    hint = nearest(name, known)
    if name in known:
        assert hint.startswith(f"did you mean {name}")
    assert any(k in hint for k in known)
