"""The wheel, a bare import, the command's start, and CI's own rule about skips."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "xedge": "xedge",
    "targets": "xedge/targets",
    "calibration": "xedge/calibration",
    "benchmarks": "xedge/benchmarks",
}
VENDORED = ("litert.js", "NOTICE.txt")
HEAVY = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ai_edge_litert",
    "matplotlib",
    "sklearn",
    "accelerate",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from a copy of the source, so that neither the copy nor a stale build/ is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "browser")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    (source / "benchmarks/browser").mkdir()  # for 70 MB of npm's, which only some checkouts have
    for name in VENDORED:
        (source / "benchmarks/browser" / name).write_text("npm's")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_the_source_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".j2", ".html") or file.name == "py.typed"
    } | {f"xedge/benchmarks/browser/{name}" for name in VENDORED}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == expected
    assert {name.split("/")[0] for name in names - info} == {"xedge"}
    assert len({name.split("/")[0] for name in info}) == 1
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_every_source_folder_is_flat_or_listed() -> None:
    """targets/, calibration/ and benchmarks/ stay flat: a subfolder would work in an editable install only."""
    for folder in ("targets", "calibration", "benchmarks"):
        inner = [p for p in (ROOT / folder).rglob("*.py") if p.parent != ROOT / folder]
        assert not inner, f"{folder}/ must stay flat"


def test_imports_with_nothing_installed(unpacked: Path, tmp_path: Path) -> None:
    """The errors and a report's words need the standard library alone."""
    venv.create(tmp_path / "bare", with_pip=False)
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r}); "
        "import xedge, xedge.errors, xedge.report_words; print(xedge.__version__)"
    )
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    import xedge

    assert done.stdout.strip() == xedge.__version__


def test_target_and_report_need_numpy_only(unpacked: Path, tmp_path: Path) -> None:
    """xedge.target types arrays, so numpy is the one package it may see: here it is linked in by itself."""
    venv.create(tmp_path / "bare", with_pip=False)
    site = Path(numpy.__file__).parents[1]
    alone = tmp_path / "numpy-alone"
    alone.mkdir()
    for name in ("numpy", "numpy.libs"):
        if (site / name).exists():
            (alone / name).symlink_to(site / name)
    code = f"import sys; sys.path[:0] = [{str(unpacked)!r}, {str(alone)!r}]; import xedge.target, xedge.report"
    # same interpreter binary as numpy's compiled parts were built for
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_version_is_written_once_more_only() -> None:
    """pyproject.toml and xedge.__version__ agree."""
    import tomllib

    import xedge

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == xedge.__version__


# ------------------------------------------------------------------------------------------------ the command


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from xedge.cli import main\n"
        "for words in ([], *([name] for name in main.commands)):\n"
        "    done = CliRunner().invoke(main, [*words, '--help'])\n"
        "    assert done.exit_code == 0, done.output\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick() -> None:
    """Under 0.3 s of processor time; on a slow or loaded machine, in proportion to `import click` alone."""
    script = str(Path(sys.executable).with_name("xedge"))
    bare = _cpu_seconds([sys.executable, "-c", "import click"])
    assert _cpu_seconds([script, "--help"]) < max(0.3, 4 * bare)


def _cpu_seconds(command: list[str], runs: int = 5) -> float:
    spent = []
    for _ in range(runs + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(spent[1:])  # the first run may write bytecode


# ------------------------------------------------------------------------------------------------ CI's rules


@pytest.mark.parametrize(
    ("forbid", "reason", "outcome"),
    [("1", "needs chromium", "failed"), ("1", "slow", "skipped"), ("0", "needs chromium", "skipped")],
)
def test_a_skip_for_an_absent_component_fails_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forbid: str, reason: str, outcome: str
) -> None:
    monkeypatch.setenv("XEDGE_FORBID_SKIPS", forbid)
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text())
    pytester.makepyfile(
        test_body=f"import pytest\ndef test_it(): pytest.skip({reason!r})",
        test_mark=f"import pytest\n@pytest.mark.skipif(True, reason={reason!r})\ndef test_it(): pass",
        test_file=f"import pytest\npytest.skip({reason!r}, allow_module_level=True)",
        test_expected="import pytest\n@pytest.mark.xfail(reason='needs a fix')\ndef test_it(): assert False",
    )
    run = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    counts = run.parseoutcomes()
    if outcome == "failed":
        assert (counts.get("failed"), counts.get("errors")) == (None, 1), counts  # a file that skips stops collection
        counts = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--ignore=test_file.py").parseoutcomes()
        assert counts == {"failed": 1, "errors": 1, "xfailed": 1}  # skipif is decided at set-up: pytest says error
    else:
        assert counts == {"skipped": 3, "xfailed": 1}


def test_makefile_refuses_an_unsupported_python(tmp_path: Path) -> None:
    """One clear line, before a venv is made."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    old = tmp_path / "python-old"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 0); $1"\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "test", f"PYTHON={old}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "xedge needs Python 3.11 to 3.13, this is 3.9" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_run_is_executable_and_strict() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
