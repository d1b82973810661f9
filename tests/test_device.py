"""Devices, device files, and what a transport does on this host: real files, real processes."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from devices import PYTHON, all_gone, local, tree
from own_lock import lock

from xedge.device import describe, open_device
from xedge.errors import DeviceError, UsageError
from xedge.transports import supervised
from xedge.transports.base import Transport
from xedge.transports.supervised import Supervised, sha256

__all__ = ["lock"]


@pytest.fixture
def here() -> Iterator[Supervised]:
    with contextlib.closing(local()) as transport:
        yield transport


# ------------------------------------------------------------------------------------------------ addresses and files


def test_local_is_this_host() -> None:
    with open_device("local") as device:
        done = device.transport.run([*device.python, "-c", "import os; print(os.uname().nodename)"], 20)
        assert (device.name, device.kind, device.target, device.address) == ("local", "real", None, "local")
        assert done.stdout.strip() == os.uname().nodename
        assert device.transport.facts()["machine"] == os.uname().machine


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("locl", "did you mean local"),
        ("http://x", "choose one of|did you mean"),
        ("ssh://", "ssh://NAME"),
        ("", "choose"),
        ("ssh://me:secret@orin", "ssh://orin: holds a password; use a key"),
        ("ssh://-oProxyCommand=x@orin", "is no SSH address"),
        ("ssh://-orin", "is no SSH address"),
        ("ssh://orin:port", "is no SSH address"),
        ("ssh://orin/tmp", "is no SSH address"),
        ("absent.toml", "absent.toml: there is no such device file"),
    ],
)
def test_unknown_forms_are_usage_errors_with_a_hint(address: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        open_device(address)


def test_a_device_file(tmp_path: Path) -> None:
    file = tmp_path / "orin-7.toml"
    file.write_text('address = "ssh://me@orin"\n')
    about = describe(str(file))
    assert (about.name, about.address, about.kind, about.target, about.python) == (
        "orin-7", "ssh://me@orin", "real", None, (),
    )  # fmt: skip
    file.write_text(
        'name = "a"\naddress = "local"\ntarget = "pixel2"\nkind = "emulated"\ncpus = [0]\n'
        f'python = ["env", "{PYTHON}"]\nssh_config = "c"\n'
    )
    assert describe(str(file)).ssh_config == tmp_path / "c"
    with open_device(str(file)) as device:
        assert (device.name, device.kind, device.target, device.cpus) == ("a", "emulated", "pixel2", (0,))
        assert device.transport.run([*device.python, "-c", "print(1)"], 20).stdout == "1\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "has no address"),
        ("address = 1", "address is 1; write address"),
        ('address = "local"\nadress = "x"', "unknown key adress; did you mean address"),
        ('address = "other.toml"', "there is no such device file|another file"),
        ('address = "local"\nkind = "reel"', "did you mean real"),
        ('address = "local"\ncpus = ["4"]', "cpus wants numbers"),
        ('address = "local"\ncpus = [true]', "cpus wants numbers"),
        ('address = "local"\npython = []', "python is"),
        ("address = ", "cannot be read as TOML"),
    ],
)
def test_device_files_that_are_wrong(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(UsageError, match=line) as caught:
        open_device(str(tmp_path / "d.toml"))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ the five


def test_push_names_the_content_and_closing_removes_it(tmp_path: Path) -> None:
    source = tmp_path / "net.onnx"
    source.write_bytes(b"one")
    transport: Transport = local()
    first = Path(transport.push(source))
    assert first.name == "net.onnx"
    assert sha256(source)[:16] in str(first)
    stamp = first.stat().st_mtime_ns
    assert Path(transport.push(source)).stat().st_mtime_ns == stamp  # not copied again
    source.write_bytes(b"two")
    second = Path(transport.push(source))
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    first.write_bytes(b"rotten")
    source.write_bytes(b"one")
    assert Path(transport.push(source)).read_bytes() == b"one"  # what lies there is checked, not trusted
    transport.close()
    transport.close()
    assert not first.parent.parent.exists()
    with pytest.raises(DeviceError, match="closed"):
        transport.push(source)


@pytest.mark.parametrize("size", [0, 1, supervised.PIECE, supervised.PIECE + 1, 5_000_000])
def test_files_of_every_size_come_and_go_whole(here: Supervised, tmp_path: Path, size: int) -> None:
    data = hashlib.shake_256(b"x").digest(size)
    (tmp_path / "a").write_bytes(data)
    here.pull(here.push(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


def test_files_that_are_not_there(here: Supervised) -> None:
    with pytest.raises(UsageError, match=r"no/net\.onnx: cannot read"):
        here.push(Path("no/net.onnx"))


def test_pull_brings_a_whole_file_or_none(here: Supervised, tmp_path: Path) -> None:
    here.run([PYTHON, "-c", "open('made', 'w').write('here')"], 20)
    here.pull(str(here.folder / "made"), tmp_path / "got")
    assert (tmp_path / "got").read_text() == "here"
    with pytest.raises(DeviceError, match="cannot fetch"):
        here.pull(str(here.folder / "absent"), tmp_path / "nothing")
    with pytest.raises(UsageError, match="cannot write"):
        here.pull(str(here.folder / "made"), tmp_path / "no" / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got"]


def test_run_keeps_arguments_streams_and_exit_codes_apart(here: Supervised) -> None:
    code = "import sys; print(sys.argv[1:]); print('aside', file=sys.stderr); sys.exit(7)"
    done = here.run([PYTHON, "-c", code, "a b", "$(id)", "; ls"], 20)
    assert done.stdout == "['a b', '$(id)', '; ls']\n"
    assert (done.stderr, done.exit_code) == ("aside\n", 7)
    killed = here.run([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], 20)
    assert killed.exit_code == -9
    with pytest.raises(DeviceError, match="no-such-program: cannot start"):
        here.run(["no-such-program"], 1)
    assert here.run([PYTHON, "-c", "import sys; print(sys.stdin.read())"], 20).stdout == "\n"
    big = here.run([PYTHON, "-c", "print('é' * 3000000, end='')"], 20)
    assert big.stdout == "é" * 3_000_000


def test_a_timeout_ends_the_whole_tree_and_the_transport_goes_on(here: Supervised, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DeviceError, match="not done after 1 s"):
        here.run(tree(tmp_path / "pids"), 1)
    assert time.monotonic() - start < 10
    assert all_gone(tmp_path / "pids")
    assert here.run(["true"], 5).exit_code == 0


@pytest.mark.parametrize("seconds", [0, 300])
def test_where_the_kernel_gives_no_orphans_back_they_are_known_by_their_mark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: int
) -> None:
    source = supervised.supervisor_source().replace(
        b"_PR_SET_CHILD_SUBREAPER = 1, 36", b"_PR_SET_CHILD_SUBREAPER = 1, 0"
    )
    monkeypatch.setattr(supervised, "supervisor_source", lambda: source)
    with contextlib.closing(local()) as transport, contextlib.suppress(DeviceError):
        transport.run(tree(tmp_path / "pids", seconds), 1.5)
    assert all_gone(tmp_path / "pids")


def test_a_command_that_closes_its_output_is_timed_too(here: Supervised) -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep({})"
    with pytest.raises(DeviceError, match="not done after"):
        here.run([PYTHON, "-c", code.format(60)], 0.5)
    assert here.run([PYTHON, "-c", code.format(0.1)], 20).exit_code == 0


def test_children_of_a_finished_command_do_not_live_on(here: Supervised, tmp_path: Path) -> None:
    assert here.run(tree(tmp_path / "pids", 0), 20).stdout == "started\n"
    assert all_gone(tmp_path / "pids")


def test_a_command_that_talks_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    source = supervised.supervisor_source().replace(b"FLOOD = 256 << 20", b"FLOOD = 2 << 20")
    monkeypatch.setattr(supervised, "supervisor_source", lambda: source)
    with contextlib.closing(local()) as transport, pytest.raises(DeviceError, match="yes: printed 2 MiB, killed"):
        transport.run(["yes"], 20)


def test_the_supervisor_is_in_the_language_of_the_oldest_python_on_boards() -> None:
    ast.parse(supervised.supervisor_source(), feature_version=(3, 8))


def test_nothing_piles_up_over_many_commands(here: Supervised) -> None:
    def state() -> tuple[int, int]:
        descriptors = here.run(["sh", "-c", "sleep 0.3; ls /proc/$PPID/fd | wc -l; pgrep -c -P $PPID"], 10).stdout
        first, second = descriptors.split()
        return int(first), int(second)

    before = state()
    for _ in range(30):
        here.run(["true"], 10)
    assert state() == before
