"""ADB: the real adb program against a phone's side of the protocol in a process of its own, with every fault."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from devices import TREE, all_gone, comes_true, pids
from small_run import network

from xedge.device import open_device
from xedge.errors import DeviceError, UsageError
from xedge.measure import Protocol, measure
from xedge.transports import adb
from xedge.transports.adb import Adb, attached
from xedge.transports.supervised import sha256

PYTHON = sys.executable
DAEMON = Path(__file__).with_name("adb_daemon.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server of our own: a port and keys apart from the user's."""
    if shutil.which("adb") is None:
        pytest.skip("needs adb: apt-get install adb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        patched.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield
        subprocess.run(["adb", "kill-server"], capture_output=True, timeout=20, check=False)


class Phone:
    """A daemon and the address it is reached at."""

    def __init__(self, folder: Path, *flags: str, before: tuple[str, ...] = ()) -> None:
        port = folder / f"port-{time.monotonic_ns()}"
        self.process = subprocess.Popen([*before, PYTHON, str(DAEMON), str(port), *flags])
        assert comes_true(port.exists)
        self.serial = f"127.0.0.1:{port.read_text()}"

    def end(self) -> None:
        subprocess.run(["adb", "disconnect", self.serial], capture_output=True, timeout=20, check=False)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def phone(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Phone]]:
    """Starts phones."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(adb, "BASE", str(tmp_path / "data"))
    started: list[Phone] = []

    def start(*flags: str, before: tuple[str, ...] = ()) -> Phone:
        started.append(Phone(tmp_path, *flags, before=before))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture(params=["", "old"], ids=["shell-v2", "shell-v1"])
def any_phone(request: pytest.FixtureRequest, phone: Callable[..., Phone]) -> Phone:
    return phone(*request.param.split())


def tree(file: Path, seconds: float = 300) -> list[str]:
    return [PYTHON, "-c", TREE, str(file), str(seconds)]


# -------------------------------------------------------------------------------------------------------- it works


def test_files_go_and_come_back_whole(any_phone: Phone, tmp_path: Path) -> None:
    source = tmp_path / "a 'b' $(id).onnx"
    source.write_bytes(os.urandom(1_000_000))
    with contextlib.closing(Adb(any_phone.serial)) as there:
        remote = there.push(source)
        stamp = Path(remote).stat().st_mtime_ns
        assert there.push(source) == remote
        assert Path(remote).stat().st_mtime_ns == stamp
        there.pull(remote, tmp_path / "back")
        assert sha256(tmp_path / "back") == sha256(source)
        with pytest.raises(DeviceError, match=r"cannot fetch .*absent"):
            there.pull(f"{there.folder}/absent", tmp_path / "nothing")
        with pytest.raises(UsageError, match="no/net: cannot read"):
            there.push(Path("no/net"))
        with pytest.raises(UsageError, match="cannot write"):
            there.pull(remote, tmp_path / "no" / "folder")
    assert not there.folder.exists()
    assert not list(tmp_path.glob("nothing*"))


def test_streams_arguments_and_exit_codes_are_kept_apart_also_by_an_old_shell(any_phone: Phone) -> None:
    code = "import sys; print(sys.argv[1:]); print('aside', file=sys.stderr); sys.exit(7)"
    with contextlib.closing(Adb(any_phone.serial)) as there:
        done = there.run([PYTHON, "-c", code, "a b", "$(id)", "; ls", "it's"], 20)
        assert (done.stdout, done.stderr, done.exit_code) == ("""['a b', '$(id)', '; ls', "it's"]\n""", "aside\n", 7)
        assert there.run([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], 20).exit_code == -9
        big = there.run([PYTHON, "-c", "print('é\\r\\n' + 'x' * 300000, end='')"], 20).stdout
        assert big == "é\r\n" + "x" * 300_000
        with pytest.raises(DeviceError, match="no-such-program: cannot start"):
            there.run(["no-such-program"], 20)
        assert there.facts()["machine"] == os.uname().machine


def test_a_timeout_ends_the_whole_tree_and_the_phone_stays_of_use(any_phone: Phone, tmp_path: Path) -> None:
    with contextlib.closing(Adb(any_phone.serial)) as there:
        with pytest.raises(DeviceError, match=r"not done after 1.5 s, killed"):
            there.run(tree(tmp_path / "pids"), 1.5)
        assert all_gone(tmp_path / "pids")
        assert there.run(["true"], 20).exit_code == 0


def test_children_of_a_finished_command_do_not_live_on(any_phone: Phone, tmp_path: Path) -> None:
    with contextlib.closing(Adb(any_phone.serial)) as there:
        assert there.run(tree(tmp_path / "pids", 0), 20).stdout == "started\n"
    assert all_gone(tmp_path / "pids")


def test_a_model_is_timed_by_the_agent(phone: Callable[..., Phone], tmp_path: Path) -> None:
    file = tmp_path / "phone.toml"
    file.write_text(f'address = "adb://{phone().serial}"\npython = "{PYTHON}"\nkind = "fake"\n')
    with open_device(str(file)) as device:
        found = measure(
            device, network(tmp_path / "a.onnx", 8), protocol=Protocol("quick", "", 2, 20, 0.0, 0.0, 5.0, 0, 0.0)
        )
    assert (found.device, found.device_kind, len(found.processes)) == ("phone", "fake", 2)
    assert found.interval.median > 0


def test_phones_that_adb_knows_are_listed(phone: Callable[..., Phone]) -> None:
    one, other = phone(), phone("stranger")
    for serial in (one.serial, other.serial):
        subprocess.run(["adb", "connect", serial], capture_output=True, timeout=20, check=False)
    assert {one.serial, other.serial} <= set(attached())


# ----------------------------------------------------------------------------------------------------- the faults


def test_a_phone_that_is_not_there(server: None) -> None:
    with pytest.raises(DeviceError, match="adb://0123456: is not connected; see what is: adb devices"):
        Adb("0123456")


def test_a_phone_that_trusts_nobody(phone: Callable[..., Phone]) -> None:
    with pytest.raises(DeviceError, match="does not trust this computer; unlock it and allow USB debugging"):
        Adb(phone("stranger").serial)


def test_without_adb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="adb is not installed; sudo apt-get install adb"):
        Adb("0123456")


def test_a_push_that_arrives_damaged(phone: Callable[..., Phone], tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"w" * 300_000)
    with contextlib.closing(Adb(phone("flip").serial)) as there:
        with pytest.raises(DeviceError, match=r"net to adb://.*: arrived with another checksum"):
            there.push(tmp_path / "net")
        assert list(there.folder.iterdir()) == []


def test_a_full_disk(phone: Callable[..., Phone], tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"w" * 300_000)
    with contextlib.closing(Adb(phone(before=("prlimit", "--fsize=100000")).serial)) as there:
        with pytest.raises(DeviceError, match=r"net to adb://.*: adb push failed: .*File too large"):
            there.push(tmp_path / "net")
        assert list(there.folder.iterdir()) == []


def in_the_midst(there: Adb, file: Path, then: Callable[[], None]) -> DeviceError:
    """Run a TREE, and once it has started do `then`: the error that comes of it."""

    def act() -> None:
        pids(file)
        then()

    thread = threading.Thread(target=act)
    thread.start()
    with pytest.raises(DeviceError) as caught:
        there.run(tree(file), 60)
    thread.join()
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_phone_that_dies_mid_run_is_no_success(any_phone: Phone, tmp_path: Path) -> None:
    """adb itself ends with 0 and says nothing."""
    there = Adb(any_phone.serial)
    in_the_midst(there, tmp_path / "pids", any_phone.process.kill)
    assert all_gone(tmp_path / "pids")
    there.close()


@pytest.mark.parametrize("words", ["xedge.lock", "SEND", "wwww", "mv ", "XEDGE_MARK", "RECV"])
def test_a_connection_cut_in_any_phase_is_a_device_error_and_leaves_nothing(
    phone: Callable[..., Phone], words: str, tmp_path: Path
) -> None:
    """The lock, a push before, within and after its data, a command, and the return of what it printed."""
    one = phone(f"cut:{words}")
    (tmp_path / "net").write_bytes(b"w" * 300_000)

    def use() -> None:
        with contextlib.closing(Adb(one.serial, wait=5.0)) as there:
            remote = there.push(tmp_path / "net")
            there.run(tree(tmp_path / "pids", 0), 20)
            there.pull(remote, tmp_path / "back")

    with pytest.raises(DeviceError) as caught:
        use()
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert one.serial in str(caught.value) or "cannot fetch" in str(caught.value)
    assert not list(tmp_path.glob("back*"))
    assert not (tmp_path / "pids").exists() or all_gone(tmp_path / "pids")
    subprocess.run(["adb", "disconnect", one.serial], capture_output=True, timeout=20, check=False)
    use()  # plugged in again it is of use: the lock is free
    assert (tmp_path / "back").read_bytes() == b"w" * 300_000
    assert comes_true(lambda: not list(Path(adb.BASE).iterdir()))


def test_a_phone_that_freezes_is_given_up(
    phone: Callable[..., Phone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = phone()
    there = Adb(frozen.serial, lease=2.0)
    error = in_the_midst(there, tmp_path / "pids", lambda: frozen.process.send_signal(signal.SIGSTOP))
    assert "no sign of life for 2 s" in str(error)
    monkeypatch.setattr(adb, "ANSWER", 1.0)
    with pytest.raises(DeviceError, match="no answer to adb shell for 1 s"):
        there.push(Path(__file__))
    there.close()
    frozen.process.kill()  # as a phone does that is switched off; its side frees itself
    assert all_gone(tmp_path / "pids")


HOST = """
import sys
sys.path.insert(0, sys.argv[1])
from devices import TREE
from xedge.transports import adb
adb.BASE = sys.argv[2]
there = adb.Adb(sys.argv[3], wait=0.0)
there.run([sys.executable, "-c", TREE, sys.argv[4], "300"], 300)
"""


def host(phone: Phone, tmp_path: Path) -> subprocess.Popen[bytes]:
    words = [Path(__file__).parent, adb.BASE, phone.serial, tmp_path / "pids"]
    return subprocess.Popen([PYTHON, "-c", HOST, *map(str, words)], stderr=subprocess.DEVNULL)


def test_a_host_that_dies_leaves_nothing_but_its_folder_which_the_next_sweeps(
    phone: Callable[..., Phone], tmp_path: Path
) -> None:
    one = phone()
    process = host(one, tmp_path)
    pids(tmp_path / "pids")
    process.kill()
    process.wait()
    assert all_gone(tmp_path / "pids")
    with contextlib.closing(Adb(one.serial, wait=10.0)) as there:
        assert list(Path(adb.BASE).glob("xedge-*")) == [there.folder]
    assert list(Path(adb.BASE).iterdir()) == []


# ------------------------------------------------------------------------------------------------------- the lock


def test_a_second_job_queues_and_says_for_whom(phone: Callable[..., Phone], tmp_path: Path) -> None:
    one = phone()
    first = host(one, tmp_path)
    pids(tmp_path / "pids")
    said: list[str] = []
    with pytest.raises(DeviceError, match=f"still in use by {os.uname().nodename}/{first.pid} after 1 s"):
        Adb(one.serial, wait=1.0)

    def end() -> None:
        if comes_true(lambda: bool(said)):
            first.kill()

    killer = threading.Thread(target=end)
    killer.start()
    with contextlib.closing(Adb(one.serial, wait=20.0, say=said.append)) as second:
        assert second.run(["true"], 20).exit_code == 0
    killer.join()
    first.wait()
    assert said == [f"waiting for adb://{one.serial}: in use by {os.uname().nodename}/{first.pid}"]


@pytest.mark.parametrize(
    "record", ["1:1:{boot}:them", "999999999:5:{boot}:them", "{pid}:{start}:another-boot:them", "nonsense"]
)
def test_a_lock_of_the_dead_is_taken_over(phone: Callable[..., Phone], record: str) -> None:
    """Another start time, no such process, another boot, no record at all."""
    start = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    os.symlink(record.format(pid=os.getpid(), start=start, boot=boot), Path(adb.BASE) / "xedge.lock")
    said: list[str] = []
    with contextlib.closing(Adb(phone().serial, wait=0.0, say=said.append)):
        pass
    assert len(said) == 1
    assert "took over the lock of a job that died" in said[0]


def test_a_lock_of_the_living_is_not(phone: Callable[..., Phone]) -> None:
    start = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    os.symlink(f"{os.getpid()}:{start}:{boot}:me", Path(adb.BASE) / "xedge.lock")
    with pytest.raises(DeviceError, match="still in use by me"):
        Adb(phone().serial, wait=0.0)
    assert (Path(adb.BASE) / "xedge.lock").is_symlink()
