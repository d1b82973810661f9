"""What the tests of transports share: a tree of processes that does not want to die, and a wire that breaks on cue."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from xedge.transports.base import Wire
from xedge.transports.local import _why
from xedge.transports.supervised import Supervised, open_process, starter

TREE = """
import os, signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)  # what it starts inherits that
pids = [os.getpid(), subprocess.Popen(["sleep", "300"], start_new_session=True).pid]
end, other = os.pipe()
child = os.fork()
if child == 0:  # a daemon: twice forked, with a session of its own
    os.setsid()
    daemon = os.fork()
    if daemon:
        os.write(other, str(daemon).encode())
        os._exit(0)
    os.execvp("sleep", ["sleep", "300"])
os.waitpid(child, 0)
pids.append(int(os.read(end, 20)))
with open(sys.argv[1] + ".part", "w") as file:
    file.write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".part", sys.argv[1])
print("started", flush=True)
time.sleep(float(sys.argv[2]))
"""
"""python -c TREE FILE SECONDS: three processes, their numbers in FILE; none ends at SIGTERM, SIGHUP or SIGINT."""

RELAY = """
import os, select, subprocess, sys
cue, fault = sys.argv[1].encode(), sys.argv[2]
there = subprocess.Popen(sys.argv[3:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
line = b""
while True:
    ready = select.select([0, there.stdout], [], [])[0]
    if 0 in ready:
        piece = os.read(0, 1 << 16)
        line = (line + piece)[-200000:]
        if cue in line and fault == "cut":
            there.stdin.close()
            os._exit(1)
        if cue in line and fault == "flip":
            at = piece.rindex(b'"data":"') + 9
            piece = piece[:at] + bytes([piece[at] ^ 3]) + piece[at + 1:]
            fault = ""
        if not piece:
            there.stdin.close()
        there.stdin.write(piece)
    if there.stdout in ready:
        piece = os.read(there.stdout.fileno(), 1 << 16)
        if not piece:
            os._exit(there.wait())
        if fault == "mute" and cue in line:
            continue
        if fault == "garble" and cue in line and b"{" in piece:
            piece, fault = piece.replace(b"{", b"[", 1), ""
        os.write(1, piece)
"""
"""python -c RELAY CUE FAULT COMMAND...: the command behind a wire that goes wrong once the host has said CUE."""


def local(connect: Callable[[Sequence[str]], Wire] | None = None, **options: object) -> Supervised:
    """The local transport, by another wire where one is given."""
    return Supervised(connect or wire(), "local", **options)  # type: ignore[arg-type]


def wire(*before: str) -> Callable[[Sequence[str]], Wire]:
    """A local wire with `before` in front of the supervisor's command."""
    return lambda words: open_process([*before, *starter([sys.executable]), *words], _why)


def broken(cue: str, fault: str) -> Supervised:
    """The local transport behind RELAY; silence is found out quickly where it is the fault."""
    return local(wire(sys.executable, "-c", RELAY, cue, fault), lease=1.0 if fault == "mute" else 20.0)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, or gone between open and read
        return False


def comes_true(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def pids(file: Path) -> list[int]:
    """Of a TREE, once it has started."""
    assert comes_true(file.exists)
    return [int(pid) for pid in file.read_text().split()]


def all_gone(file: Path) -> bool:
    """Whether nothing of a TREE is left, or will be in a moment."""
    found = pids(file)
    assert len(found) == 3
    return comes_true(lambda: not any(map(alive, found)))


PYTHON = sys.executable


def tree(file: Path, seconds: float = 300) -> list[str]:
    return [PYTHON, "-c", TREE, str(file), str(seconds)]
