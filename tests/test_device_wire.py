"""Wires that break in every phase, garbage for answers, a full disk, a clock that jumps: on this host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from devices import PYTHON, RELAY, all_gone, broken, comes_true, local, tree, wire
from own_lock import lock

from xedge.errors import DeviceError
from xedge.transports import supervised
from xedge.transports.supervised import Supervised, sha256

__all__ = ["lock"]


def use(transport: Supervised, tmp_path: Path) -> None:
    """Every phase there is."""
    (tmp_path / "net").write_bytes(b"w" * 300_000)
    with contextlib.closing(transport):
        remote = transport.push(tmp_path / "net")
        transport.run(tree(tmp_path / "pids", 0), 20)
        transport.pull(remote, tmp_path / "back")


PHASES = ['"have"', '"put"', '"seal"', '"run"', '"get"']


@pytest.mark.parametrize("cue", PHASES)
def test_a_wire_cut_in_any_phase_is_a_device_error_and_leaves_nothing(cue: str, tmp_path: Path) -> None:
    transport = broken(cue, "cut")
    with pytest.raises(DeviceError, match=r"local: the supervisor ended|cannot fetch") as caught:
        use(transport, tmp_path)
    assert caught.value.exit_code == 5
    assert comes_true(lambda: not transport.folder.exists())
    assert not list(tmp_path.glob("back*"))
    assert cue not in PHASES[3:] or not (tmp_path / "pids").exists() or all_gone(tmp_path / "pids")


@pytest.mark.parametrize("cue", PHASES)
def test_a_device_that_falls_silent_in_any_phase_is_given_up(cue: str, tmp_path: Path) -> None:
    transport = broken(cue, "mute")
    start = time.monotonic()
    with pytest.raises(DeviceError, match=r"no sign of life for [13] s"):
        use(transport, tmp_path)
    assert time.monotonic() - start < 30
    assert comes_true(lambda: not transport.folder.exists())
    assert not list(tmp_path.glob("back*"))


def test_a_supervisor_that_is_frozen_is_given_up_also_in_the_midst_of_a_push(tmp_path: Path) -> None:
    started: list[int] = []

    def connect(words: list[str]):  # type: ignore[no-untyped-def]
        made = wire()(words)
        started.append(int(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1]))
        return made

    (tmp_path / "net").write_bytes(b"w" * 3_000_000)
    with contextlib.closing(local(connect, lease=1.0)) as transport:
        os.kill(started[0], signal.SIGSTOP)
        with pytest.raises(DeviceError, match=r"no sign of life|took nothing for 1 s"):
            transport.push(tmp_path / "net")
    assert not Path(f"/proc/{started[0]}").exists()
    shutil.rmtree(transport.folder)


def test_a_push_that_arrives_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"w" * 300_000)
    transport = broken('"put"', "flip")
    with contextlib.closing(transport), pytest.raises(DeviceError, match="net to local: arrived with another checksum"):
        transport.push(tmp_path / "net")
    assert not (transport.folder / sha256(tmp_path / "net")[:16] / "net").exists()


def test_an_answer_that_arrives_damaged_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(broken('"facts"', "garble")) as transport, pytest.raises(DeviceError, match="garbled"):
        transport.facts()


def test_greetings_of_a_login_shell_are_no_answers() -> None:
    greeting = ["sh", "-c", 'echo "Welcome to {"; printf "no newline"; exec "$@"', "sh"]
    with contextlib.closing(local(wire(*greeting))) as transport:
        assert transport.run(["echo", "hi"], 5).stdout == "hi\n"


def test_what_is_no_supervisor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="garbage"):
        local(wire("sh", "-c", "tr '\\0' x </dev/zero"))
    with pytest.raises(DeviceError, match=r"the supervisor ended .exit code 3"):
        local(wire("sh", "-c", "exit 3"))
    with pytest.raises(DeviceError, match=r"the supervisor ended .*no-such-python"):
        local(wire("sh", "-c", "no-such-python"))
    monkeypatch.setattr(supervised, "CONNECT", 1.0)
    for mute in ("exec sleep 60", "while echo hello; do :; done"):
        with pytest.raises(DeviceError, match="no sign of life for 1 s"):
            local(wire("sh", "-c", mute))


def test_a_full_disk_is_said_and_nothing_half_written_stays(tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"w" * 300_000)
    with contextlib.closing(local(wire("prlimit", "--fsize=100000"))) as transport:
        with pytest.raises(DeviceError, match=r"net to local: cannot write in .*: File too large; check its disk"):
            transport.push(tmp_path / "net")
        assert not [path for path in transport.folder.rglob("net*") if path.is_file()]
        (tmp_path / "small").write_bytes(b"w")
        transport.push(tmp_path / "small")


def test_no_room_for_the_folder_at_all() -> None:
    with pytest.raises(DeviceError, match=r"local: .*(No usable temporary directory|File too large)"):
        local(wire("prlimit", "--fsize=1"))


def test_a_clock_that_jumps_ends_nothing_early(tmp_path: Path) -> None:
    if shutil.which("faketime") is None:
        pytest.skip("needs faketime: apt-get install faketime")
    stamp = tmp_path / "time"
    stamp.write_text("+0\n")
    library = subprocess.run(
        ["faketime", "-f", "+0", "sh", "-c", "echo $LD_PRELOAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    clock = ["env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={stamp}", "FAKETIME_NO_CACHE=1"]
    clock += ["FAKETIME_DONT_FAKE_MONOTONIC=1"]
    code = "import select, time; a = time.time(); select.select([], [], [], 2); print(time.time() - a)"
    with contextlib.closing(local(wire(*clock), lease=3.0)) as transport:
        jump = threading.Timer(1.0, stamp.write_text, ("-86400\n",))
        jump.start()
        done = transport.run([PYTHON, "-c", code], 20)
        jump.join()
    assert float(done.stdout) < -80_000, "the clock did not jump: this test proves nothing"


def test_the_relay_by_itself_breaks_nothing(tmp_path: Path) -> None:
    use(local(wire(PYTHON, "-c", RELAY, "never said", "cut")), tmp_path)
    assert (tmp_path / "back").read_bytes() == b"w" * 300_000
    assert all_gone(tmp_path / "pids")
