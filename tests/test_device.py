"""Device and the local transport: real files, real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from xedge.device import open_device
from xedge.errors import DeviceError, UsageError
from xedge.transports.base import Transport
from xedge.transports.local import Local, sha256


def test_local_is_this_host() -> None:
    with open_device("local") as device:
        done = device.transport.run([*device.python, "-c", "import os; print(os.uname().nodename)"], 20)
        assert (device.name, device.kind, device.target, device.address) == ("local", "real", None, "local")
        assert done.stdout.strip() == os.uname().nodename
        assert device.transport.facts()["machine"] == os.uname().machine


@pytest.mark.parametrize("address", ["ssh://me@orin", "adb://0123456", "browser"])
def test_what_this_version_lacks_is_said_and_is_a_device_error(address: str) -> None:
    with pytest.raises(DeviceError, match="not in it") as caught:
        open_device(address)
    assert caught.value.exit_code == 5
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("locl", "did you mean local"),
        ("http://x", "choose one of|did you mean"),
        ("ssh://", "ssh://NAME"),
        ("", "choose"),
    ],
)
def test_unknown_forms_are_usage_errors_with_a_hint(address: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        open_device(address)


def test_push_names_the_content_and_closing_removes_it(tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    source.write_bytes(b"one")
    local: Transport = Local()
    first = Path(local.push(source))
    assert first.name == "net.onnx"
    assert sha256(source)[:16] in str(first)
    stamp = first.stat().st_mtime_ns
    assert Path(local.push(source)).stat().st_mtime_ns == stamp  # not copied again
    source.write_bytes(b"two")
    second = Path(local.push(source))
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    first.write_bytes(b"rotten")
    source.write_bytes(b"one")
    assert Path(local.push(source)).read_bytes() == b"one"  # what lies there is checked, not trusted
    local.close()
    local.close()
    assert not first.exists()


def test_files_that_are_not_there() -> None:
    local = Local()
    with pytest.raises(UsageError, match=r"no/net\.onnx: cannot copy"):
        local.push(Path("no/net.onnx"))
    local.close()


def test_pull_brings_a_whole_file_or_none(tmp_path: Path) -> None:
    local = Local()
    local.run([sys.executable, "-c", "open('made', 'w').write('here')"], 20)
    local.pull(str(local.folder / "made"), tmp_path / "got")
    assert (tmp_path / "got").read_text() == "here"
    with pytest.raises(DeviceError, match="cannot fetch"):
        local.pull(str(local.folder / "absent"), tmp_path / "nothing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got"]
    local.close()


def test_run_keeps_arguments_streams_and_exit_codes_apart() -> None:
    local = Local()
    code = "import sys; print(sys.argv[1:]); print('aside', file=sys.stderr); sys.exit(7)"
    done = local.run([sys.executable, "-c", code, "a b", "$(id)", "; ls"], 20)
    assert done.stdout == "['a b', '$(id)', '; ls']\n"
    assert (done.stderr, done.exit_code) == ("aside\n", 7)
    killed = local.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 20)
    assert killed.exit_code == -9
    with pytest.raises(DeviceError, match="no-such-program: cannot start"):
        local.run(["no-such-program"], 1)
    local.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


CHILD = "import subprocess; p = subprocess.Popen(['sleep', '60']); open('pid', 'w').write(str(p.pid)); "


def test_a_timeout_ends_the_whole_tree() -> None:
    local = Local()
    start = time.monotonic()
    with pytest.raises(DeviceError, match="not done after 1 s"):
        local.run([sys.executable, "-c", CHILD + "p.wait()"], 1)
    assert time.monotonic() - start < 10
    assert gone(int((local.folder / "pid").read_text()))
    local.close()


def test_children_of_a_finished_command_do_not_live_on() -> None:
    local = Local()
    code = CHILD.replace("['sleep', '60']", "['sleep', '60'], stdout=-3, stderr=-3")
    local.run([sys.executable, "-c", code], 20)
    assert gone(int((local.folder / "pid").read_text()))
    local.close()
