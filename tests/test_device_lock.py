"""Whoever dies, host or supervisor, leaves nothing on a device; and its lock passes on to the next."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from devices import PYTHON, all_gone, comes_true, local, pids
from own_lock import lock

from xedge.device import open_device
from xedge.errors import DeviceError

__all__ = ["lock"]


# ------------------------------------------------------------------------------------- whoever dies, nothing stays


HOST = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from devices import TREE, local
here = local(wait=0.0, lease=float(sys.argv[4]))
Path(sys.argv[2]).write_text(str(here.folder))
here.run([sys.executable, "-c", TREE, sys.argv[3], "300"], 300)
"""


def host(tmp_path: Path, lease: float = 20.0) -> subprocess.Popen[bytes]:
    """Another process that holds the device and runs a TREE on it."""
    words = [PYTHON, "-c", HOST, str(Path(__file__).parent), tmp_path / "folder", tmp_path / "pids", str(lease)]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def supervisor(tree_pid: int) -> int:
    return int(Path(f"/proc/{tree_pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_host_that_dies_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = host(tmp_path)
    pids(tmp_path / "pids")
    process.send_signal(number)
    try:
        process.wait(20)
    finally:
        process.kill()
        process.wait()
    assert all_gone(tmp_path / "pids")
    assert comes_true(lambda: not Path((tmp_path / "folder").read_text()).exists())
    with contextlib.closing(local(wait=5.0)):
        pass  # the lock is free


def test_a_frozen_host_leaves_nothing_after_its_lease(tmp_path: Path) -> None:
    process = host(tmp_path, lease=2.0)
    pids(tmp_path / "pids")
    process.send_signal(signal.SIGSTOP)
    try:
        assert all_gone(tmp_path / "pids")
    finally:
        process.kill()
        process.wait()


def test_a_host_that_is_busy_elsewhere_keeps_its_lease(tmp_path: Path) -> None:
    with contextlib.closing(local(lease=2.0)) as transport:
        time.sleep(4)
        assert transport.run(["echo", "still"], 5).stdout == "still\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_supervisor_that_is_told_to_end_takes_all_with_it(tmp_path: Path, number: signal.Signals) -> None:
    process = host(tmp_path)
    os.kill(supervisor(pids(tmp_path / "pids")[0]), number)
    assert process.wait(20) == 1
    assert all_gone(tmp_path / "pids")
    assert not Path((tmp_path / "folder").read_text()).exists()


def test_a_supervisor_killed_outright_takes_its_command_along_and_the_next_one_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    process = host(tmp_path)
    command, *rest = pids(tmp_path / "pids")
    os.kill(supervisor(command), signal.SIGKILL)
    assert process.wait(20) == 1
    assert comes_true(lambda: not Path(f"/proc/{command}").exists())
    for pid in rest:  # SIGKILL leaves a supervisor no time for its grandchildren
        os.kill(pid, signal.SIGKILL)
    left = Path((tmp_path / "folder").read_text())
    assert left.exists()
    said: list[str] = []
    with contextlib.closing(local(wait=0.0, say=said.append)):
        assert not left.exists()
    assert len(said) == 1
    assert said[0].startswith(f"local: took over the lock of a job that died, {os.uname().nodename}:{process.pid}")


def test_only_folders_of_the_dead_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with contextlib.closing(local()) as one:
        owner = json.loads((one.folder / ".owner").read_text())
        for name, change in {"pid": {"start": 1}, "boot": {"boot": "another"}, "torn": None}.items():
            (tmp_path / f"xedge-{name}").mkdir()
            text = json.dumps({**owner, **change}) if change else '{"pid": 1'
            (tmp_path / f"xedge-{name}" / ".owner").write_text(text)
        (tmp_path / "xedge-theirs").mkdir()
        with contextlib.closing(local()) as two:
            left = {path.name for path in tmp_path.glob("xedge-*")}
    assert left == {one.folder.name, two.folder.name, "xedge-theirs", "xedge-torn"}


# ---------------------------------------------------------------------------------------------------- the lock


def test_a_second_job_queues_and_says_for_whom(tmp_path: Path) -> None:
    first = host(tmp_path)
    pids(tmp_path / "pids")
    said: list[str] = []

    def end() -> None:
        if comes_true(lambda: bool(said)):
            first.kill()

    killer = threading.Thread(target=end)
    killer.start()
    with contextlib.closing(local(wait=20.0, say=said.append)) as second:
        assert second.run(["true"], 5).exit_code == 0
        assert all_gone(tmp_path / "pids")
    killer.join()
    first.wait()
    assert len(said) == 1
    assert said[0].startswith(f"waiting for local: in use by {os.uname().nodename}:{first.pid} (pid ")


def test_a_queue_that_is_too_long_is_a_device_error(tmp_path: Path) -> None:
    first = host(tmp_path)
    try:
        pids(tmp_path / "pids")
        with pytest.raises(DeviceError, match=r"local: still in use by .* after 0.3 s"):
            local(wait=0.3)
        with contextlib.closing(local()) as looking:  # without the lock: no queue
            assert looking.facts()["system"].startswith("Linux")
    finally:
        first.kill()
        first.wait()


def test_one_process_may_open_a_device_twice() -> None:
    with open_device("local", wait=0.0), open_device("local", wait=0.0) as again:
        assert again.transport.run(["true"], 5).exit_code == 0


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '{"pid": "x"}', "x" * 9000])
def test_what_lies_in_the_lock_does_not_matter(lock: Path, text: str) -> None:
    lock.write_text(text)
    with contextlib.closing(local(wait=0.0)):
        assert json.loads(lock.read_text())["owner"] == f"{os.uname().nodename}:{os.getpid()}"
    assert lock.read_text() == ""


def test_a_lock_that_is_a_link_is_not_followed(lock: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(DeviceError, match="cannot open the lock"):
        local(wait=0.0)
    assert (tmp_path / "precious").read_text() == "data"
