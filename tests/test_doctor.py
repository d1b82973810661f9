"""doctor: what it says is what pip, dpkg and the file system say."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement as Reference
from packaging.version import Version

from xedge import doctor


def test_every_core_requirement_is_examined_with_its_installed_version() -> None:
    findings = {f.name: f for f in doctor.examine()}
    for line in importlib.metadata.requires("xedge") or ():
        reference = Reference(line)
        if reference.marker is None:
            finding = findings[reference.name.lower()]
            version = importlib.metadata.version(reference.name)
            assert finding.found == version
            assert (finding.status == "ok") == (version in reference.specifier)


def test_requirements_agree_with_packaging_on_our_own_metadata() -> None:
    lines = importlib.metadata.requires("xedge") or []
    assert lines
    for parsed, line in zip(doctor.requirements(lines), lines, strict=True):
        reference = Reference(line)
        assert parsed.name == reference.name.lower()
        assert f">={parsed.least}" == str(reference.specifier)
        assert bool(parsed.extra) == (reference.marker is not None)
        assert reference.marker is None or reference.marker.evaluate({"extra": parsed.extra})


versions = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@given(versions, versions, st.sampled_from(["", "+cpu"]))
def test_older_agrees_with_packaging(one: str, other: str, local: str) -> None:
    assert doctor.older(one + local, other) == (Version(one) < Version(other))


@pytest.mark.parametrize(
    ("version", "extra", "status"),
    [
        ("2.0", "", "ok"),
        ("1.10.1", "", "ok"),
        ("1.9", "", "outdated"),
        (None, "", "missing"),
        (None, "zoo", "optional"),
        ("1.9", "zoo", "optional"),
    ],
)
def test_a_package_is_judged_and_its_fix_names_the_bound(version: str | None, extra: str, status: str) -> None:
    finding = doctor.package(doctor.Requirement("torch", "1.10", extra), version)
    assert finding.status == status
    assert finding.fix == ("" if status == "ok" else f"{sys.executable} -m pip install 'torch>=1.10'")
    assert doctor.healthy([finding]) == (status in ("ok", "optional"))


def test_missing_tools_name_the_debian_package() -> None:
    by_name = {f.name: f for f in doctor.tools(lambda name: None)}
    assert by_name["adb"].fix == "sudo apt-get install adb"
    assert by_name["qemu-aarch64-static"].fix.endswith("qemu-user-static")
    assert all(f.fix for f in by_name.values() if f.status != "ok")
    assert doctor.healthy(by_name.values())


def test_present_tools_say_where() -> None:
    assert all(f.status == "ok" and f.found == f"/bin/{f.name}" for f in doctor.tools(lambda name: f"/bin/{name}"))


def test_half_a_data_set_is_not_there(tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        (tmp_path / name).touch()
    assert doctor.data_sets(tmp_path)[1].status == "optional"
    (tmp_path / "t10k-labels-idx1-ubyte.gz").touch()
    assert doctor.data_sets(tmp_path)[1].status == "ok"


def test_names_are_unique_and_only_healthy_lines_have_no_fix() -> None:
    findings = doctor.examine()
    assert len({f.name for f in findings}) == len(findings)
    assert all((f.fix == "") == (f.status == "ok") for f in findings)
    assert doctor.healthy(findings)


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, xedge.doctor as d; d.examine(); "
        "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
