"""A phone behind adb: the real `adb` program, none of whose answers is believed without an end mark.

adb returns 0 and says nothing when the phone dies in the midst of a command, loses exit codes on phones before
Android 7, and waits for ever for a phone that froze. So every call has a time limit of ours, a command's two streams
are files that are fetched with their checksums, and its exit code stands in a line that begins with a token.

There is no Python to count on: the supervisor is a shell script. It knows its processes, whoever their parents are by
now, by a mark in their environment, and ends them when the time is up, when adb hangs up, and when this host closes the
connection (from Android 7 on). A host that freezes without closing it is noticed only by the time limit.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xedge.errors import DeviceError, UsageError
from xedge.transports.base import Completed, Wire
from xedge.transports.supervised import LEASE, open_process, sha256

BASE = "/data/local/tmp"
"""The one folder on every Android that adb may write and run programs in."""

ANSWER = 20.0
"""Seconds for adb calls that should take none; a push gets more by its size."""

_SLOWEST = 1e6  # bytes a second, of a bad cable

_EXE = "import os; print(os.path.basename(os.readlink('/proc//self/exe')))"
"""Of whom runs Python there: qemu's user mode answers with the emulated program, but not to this spelling of it."""

_RUN = """
token=$1 seconds=$2; shift 2
end() {  # all that carry the mark; this shell itself was started without it
  for e in /proc/[0-9]*/environ; do
    if grep -q "XEDGE_MARK=$token" "$e" 2>/dev/null; then p=${e#/proc/}; kill -9 "${p%/environ}" 2>/dev/null; fi
  done
}
trap 'end; exit 1' HUP TERM INT
exec 3<&0
export XEDGE_MARK=$token
(cat <&3 >/dev/null && end) &
(while sleep BEAT; do echo "$token alive"; done) 2>/dev/null &
(sleep "$seconds" && : >late && end) &
"$@" </dev/null >out 2>err 3<&- &
wait $!; code=$?
end
late=no; if [ -e late ]; then late=yes; fi
set -- $(sha256sum out) $(sha256sum err)
echo "$token exit $code $late $1 $3"
"""

_LOCK = """
token=$1 lock=$2 owner=$3 left=$4
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
started() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null; }
mine="$$:$(started $$):$boot:$owner"
told=0
until ln -s "$mine" "$lock" 2>/dev/null; do  # a link is made at once with what it says, or not at all
  held=$(readlink "$lock") || continue
  pid=${held%%:*}; rest=${held#*:}; start=${rest%%:*}; rest=${rest#*:}; who=${rest#*:}
  if [ "${rest%%:*}" != "$boot" ] || [ "$(started "$pid")" != "$start" ]; then  # its holder died, or the phone did
    if mv "$lock" "$lock.$$" 2>/dev/null; then rm "$lock.$$"; echo "$token stale $who"; fi
    continue
  fi
  if [ "$left" -le 0 ]; then echo "$token busy $who"; exit; fi
  if [ "$told" -le 0 ]; then echo "$token waiting $who"; told=5; fi
  sleep 1; left=$((left - 1)); told=$((told - 1))
done
trap 'rm -f "$lock"; exit' HUP TERM INT
echo "$token locked"
cat >/dev/null
rm -f "$lock"
"""


def _start_server() -> None:
    nowhere = subprocess.DEVNULL
    subprocess.run(["adb", "start-server"], stdout=nowhere, stderr=nowhere, timeout=ANSWER, check=False)


def attached() -> list[str]:
    """Serial numbers of the phones that adb knows, in whatever state; none where adb is absent or does not answer."""
    try:
        _start_server()
        said = subprocess.run(["adb", "devices"], capture_output=True, text=True, timeout=ANSWER, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split("\t")[0] for line in said.splitlines()[1:] if "\t" in line]


class Adb:
    """One phone by its serial number, or HOST:PORT.

    Args:
        wait: seconds to queue for the phone's lock; None goes without the lock, for looking only.
        say: called with a line while another job holds the phone.
        python: the command there that runs the agent; it is asked whether it is emulated.

    Raises DeviceError where adb or the phone is absent, refuses this host, or is still in use after `wait` seconds.
    """

    def __init__(
        self,
        serial: str,
        wait: float | None = None,
        say: Callable[[str], None] = lambda line: None,
        lease: float = LEASE,
        python: Sequence[str] = ("python3",),
    ) -> None:
        if shutil.which("adb") is None:
            raise DeviceError("adb is not installed", where=f"adb://{serial}", fix="sudo apt-get install adb")
        self._serial, self._name, self._lease = serial, f"adb://{serial}", lease
        self._python = python
        self._token = secrets.token_hex(8)
        self._held: Wire | None = None
        self._open = True
        self.folder = Path(f"{BASE}/xedge-{self._token}")
        with contextlib.suppress(subprocess.TimeoutExpired):  # by itself: a server keeps the pipes of who started it
            _start_server()
        if ":" in serial:
            self._adb(["connect", serial], ANSWER, to_phone=False)
        self._shell(f"mkdir {self.folder}")
        try:
            if wait is not None:
                self._lock(wait, say)
                self._shell(f'for f in {BASE}/xedge-*; do [ "$f" = {self.folder} ] || rm -rf "$f"; done')
        except BaseException:
            self.close()
            raise

    # -- talking

    def _adb(
        self, words: Sequence[str], timeout: float, *, to_phone: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        argv = ["adb", *(("-s", self._serial) if to_phone else ()), *words]
        try:
            return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"no answer to adb {words[0]} for {timeout:g} s", where=self._name, fix="unplug it and plug it in again"
            ) from error

    def _shell(self, line: str) -> str:
        """What a line of ours prints; it must come with the mark that says that it ended, and well."""
        done = self._adb(["shell", f"{line} && echo {self._token} done"], ANSWER)
        said = done.stdout.decode(errors="replace").replace("\r\n", "\n")
        before, mark, _ = said.rpartition(f"{self._token} done")
        if not mark:
            raise self._explain(done.returncode, done.stderr.decode(errors="replace") or said)
        return before

    def _explain(self, code: int | None, said: str) -> DeviceError:
        if "unauthorized" in said or "authorizing" in said:
            return DeviceError(
                "does not trust this computer", where=self._name, fix="unlock it and allow USB debugging"
            )
        if "offline" in said or "not found" in said or "no devices" in said:
            return DeviceError("is not connected", where=self._name, fix="see what is: adb devices")
        last = said.strip().splitlines()[-1:] or [f"the connection ended without a word, exit code {code}"]
        return DeviceError(last[0], where=self._name, fix="check its cable, and run again")

    def _start(self, script: str, *words: str) -> Wire:
        """A script of ours under way, its standard input open."""
        line = shlex.join(["sh", "-c", script, "xedge", self._token, *words])
        return open_process(["adb", "-s", self._serial, "shell", f"cd {self.folder} && exec {line}"], self._explain)

    def _lines(self, wire: Wire, silence: float, end: float) -> Iterator[list[str]]:
        """The words after the token, line by line."""
        inbox = b""
        while True:
            left = min(silence, end - time.monotonic())
            if left <= 0 or not select.select([wire.back], [], [], left)[0]:
                raise DeviceError(f"no sign of life for {silence:g} s", where=self._name, fix="check it and its cable")
            piece = os.read(wire.back, 1 << 16)
            if not piece:
                raise wire.why()
            *lines, inbox = (inbox + piece).split(b"\n")
            for line in lines:
                token, *words = line.decode(errors="replace").split() or [""]
                if token == self._token:
                    yield words

    def _lock(self, wait: float, say: Callable[[str], None]) -> None:
        owner = f"{platform.node()}/{os.getpid()}"
        wire = self._start(_LOCK, f"{BASE}/xedge.lock", owner, f"{wait:.0f}")
        self._held = wire
        for what, *who in self._lines(wire, self._lease, time.monotonic() + wait + self._lease):
            if what == "locked":
                return
            if what == "busy":
                raise DeviceError(f"still in use by {' '.join(who)} after {wait:g} s", where=self._name)
            if what == "waiting":
                say(f"waiting for {self._name}: in use by {' '.join(who)}")
            else:
                say(f"{self._name}: took over the lock of a job that died, {' '.join(who)}")

    # -- the five

    def push(self, path: Path) -> str:
        try:
            digest, size = sha256(path), path.stat().st_size
        except OSError as error:
            raise UsageError(f"cannot read: {error.strerror or error}", where=str(path)) from error
        remote = f"{self.folder}/{digest[:16]}/{path.name}"
        place, part = shlex.quote(remote), f"{self.folder}/part"
        if self._digest(place) == digest:
            return remote
        done = self._adb(["push", str(path), part], ANSWER + size / _SLOWEST)
        if done.returncode:
            lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
            said = [line for line in lines if "error" in line or "failed" in line][-1:] or lines[-1:]
            with contextlib.suppress(DeviceError):
                self._shell(f"rm -f {part}")
            raise DeviceError(f"adb push failed: {' '.join(said)}", where=f"{path.name} to {self._name}")
        if self._digest(part) != digest:
            self._shell(f"rm -f {part}")
            raise DeviceError("arrived with another checksum", where=f"{path.name} to {self._name}", fix="try again")
        self._shell(f"mkdir -p {self.folder}/{digest[:16]} && mv {part} {place} && chmod 755 {place}")
        return remote

    def _digest(self, place: str) -> str:
        """Of a quoted path on the phone; empty where there is no such file."""
        return (self._shell(f"if [ -f {place} ]; then sha256sum {place}; fi").split() or [""])[0]

    def run(self, argv: Sequence[str], timeout: float) -> Completed:
        self._shell(f"cd {self.folder} && rm -f late out err")
        words = [str(word) for word in argv]
        wire = self._start(_RUN.replace("BEAT", f"{self._lease / 4:g}"), f"{timeout:g}", *words)
        try:
            end = time.monotonic() + timeout + 3 * self._lease
            code, late, *digests = next(rest for what, *rest in self._lines(wire, self._lease, end) if what == "exit")
        finally:
            wire.cut()
        where = " ".join(words[:2])
        if late == "yes":
            raise DeviceError(
                f"not done after {timeout:g} s, killed", where=where, fix="give it more time, or a smaller job"
            )
        out, err = (self._stream(name, digest) for name, digest in zip(("out", "err"), digests, strict=True))
        number = int(code)
        if number in (126, 127) and "xedge: " in err:  # the shell's own words on a command that it cannot start
            raise DeviceError(f"cannot start: {err.strip().splitlines()[-1]}", where=words[0])
        # A shell tells the signal that ended a command as 128 and its number.
        return Completed(tuple(words), 128 - number if number > 128 else number, out, err)

    def _stream(self, name: str, digest: str) -> str:
        with tempfile.TemporaryDirectory(prefix="xedge-") as folder:
            path = Path(folder) / name
            self.pull(f"{self.folder}/{name}", path)
            if sha256(path) != digest:
                raise DeviceError("a command's output arrived damaged", where=self._name, fix="run it again")
            return path.read_bytes().decode(errors="replace")

    def pull(self, remote: str, path: Path) -> None:
        part = path.with_name(path.name + ".part")
        if not path.parent.is_dir():
            raise UsageError("cannot write: there is no such folder", where=str(path))
        try:
            place = shlex.quote(remote)
            size = int(self._shell(f"stat -c %s {place}") or 0)
            done = self._adb(["pull", remote, str(part)], ANSWER + size / _SLOWEST)
            if done.returncode or not part.is_file() or sha256(part) != self._digest(place):
                raise DeviceError("arrived incomplete", where=remote, fix="run it again")
            part.replace(path)
        except DeviceError as error:
            raise DeviceError(f"cannot fetch {remote}: {error.what}", where=str(path)) from error
        finally:
            part.unlink(missing_ok=True)

    def facts(self) -> dict[str, str]:
        names = ("model ro.product.model", "android ro.build.version.release", "soc ro.board.platform")
        found = {"machine": self._shell("uname -m").strip(), "system": self._shell("uname -sr").strip()}
        for name, key in (word.split() for word in names):
            value = self._shell(f"getprop {key} 2>/dev/null || true").strip()
            found.update({name: value} if value else {})
        program = self._shell(f"{shlex.join([*self._python, '-c', _EXE])} 2>/dev/null || true").strip()
        if program.startswith("qemu-"):
            found["emulator"] = program
        return found

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(DeviceError):
                self._shell(f"rm -rf {self.folder}")
            if self._held is not None:
                self._held.cut()
