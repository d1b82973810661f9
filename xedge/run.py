"""The run folder: sealed steps, atomic writes, resume.

Every step writes one file (or one folder) under its own name: first beside it under a temporary name, then
`os.replace`, then a seal under `seals/` with the digests of the step's inputs and of its output. A step whose seal
matches is skipped, so killing the process at any moment loses at most the step under way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from xedge.errors import UsageError

REQUEST = "run.json"
SEALS = "seals"


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's sorted (relative path, digest) pairs."""
    if path.is_dir():
        rows = [(str(p.relative_to(path)), digest_file(p)) for p in sorted(path.rglob("*")) if p.is_file()]
        return digest_json(rows)
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_SPACE = "free some space and run the same command again: it goes on where it stopped"
_FOLDER = "choose a folder you may write with -o"
_PATH = "choose another folder with -o"
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _FOLDER),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), _PATH),
    errno.EIO: "check that disk, then run the same command again",
}


def explain(error: OSError | SafetensorError, folder: Path) -> UsageError | None:
    """What the file system said, in one line with a way out; None where it is no matter of writing `folder`."""
    if isinstance(error, OSError):
        number, name = error.errno, error.filename
    else:  # safetensors hides the number in its text
        found = re.search(r"\(os error (\d+)\)", str(error))
        number, name = (int(found.group(1)) if found else None), None
    if number not in _FIXES:
        return None
    where = os.fsdecode(name) if isinstance(name, str | bytes) else str(folder)
    there, here = Path(where).absolute(), folder.absolute()
    if isinstance(error, PermissionError) and not (there.is_relative_to(here) or here.is_relative_to(there)):
        # Something that a step reads, such as the user's pictures.
        return UsageError(os.strerror(number), where=where, fix="check who may read and write it")
    return UsageError(f"cannot write: {os.strerror(number)}", where=where, fix=_FIXES[number])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system says into one line with a way out."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        explained = explain(e, folder)
        if explained is None:
            raise
        raise explained from e


def write_atomically(path: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write a temporary file or folder, then move it to `path` in one step."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        _remove(tmp)
        try:
            make(tmp)
            for f in [tmp] if tmp.is_file() else [p for p in tmp.rglob("*") if p.is_file()]:
                _fsync(f)
            if path.is_dir():  # os.replace cannot take the place of a folder that is not empty
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                os.replace(path, old)
                os.replace(tmp, path)
                shutil.rmtree(old)
            else:
                os.replace(tmp, path)
            _fsync(path.parent)
        finally:
            _remove(tmp)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, with a stable key order."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda tmp: tmp.write_text(text))


def read_json(path: Path) -> Any:
    """Read JSON; raises UsageError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UsageError("there is no such file", where=str(path), fix="is this a run folder of xedge?") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"is not JSON ({e})", where=str(path), fix="delete it and run the command again") from e


@dataclass
class Run:
    """A run folder that this process holds."""

    folder: Path
    request: Mapping[str, Any]
    skipped: list[str]
    _lock: IO[str] | None = None

    @classmethod
    def open(cls, folder: Path, request: Mapping[str, Any]) -> Run:
        """Take the folder for this request.

        Raises:
            UsageError: the folder belongs to another request (the difference is shown), is not a run folder, cannot
                be written, or another process is at work in it.
        """
        path = folder / REQUEST
        with writing(folder):
            foreign = (
                folder.exists() and not path.exists() and any(p for p in folder.iterdir() if not p.name.startswith("."))
            )
            if foreign:
                raise UsageError("is not empty and is no run folder of xedge", where=str(folder), fix=_PATH)
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.close()
            raise UsageError(
                "another xedge is at work here", where=str(folder), fix="wait for it, or choose another folder with -o"
            ) from e
        try:
            cls._take(folder, request)
        except BaseException:
            lock.close()
            raise
        return cls(folder, request, [], lock)

    @staticmethod
    def _take(folder: Path, request: Mapping[str, Any]) -> None:
        """Clean up after a killed process, and see that the folder is this request's."""
        path = folder / REQUEST
        # What a killed process left half-written has our temporary names; nothing else has.
        with writing(folder):
            for pattern in (".*.tmp", ".*.tmp.folder", ".*.old", ".tmp??????"):  # the last is safetensors' own
                for p in [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]:
                    _remove(p)
        if not path.exists():
            write_json(path, dict(request))
            return
        before = read_json(path)
        if not isinstance(before, dict):
            raise UsageError("holds no request", where=str(path), fix=_PATH)
        keys = sorted(k for k in {*before, *request} if before.get(k) != request.get(k))
        if keys:
            diff = ", ".join(f"{k} was {before.get(k)!r} and now is {request.get(k)!r}" for k in keys)
            raise UsageError(f"holds another run ({diff})", where=str(folder), fix=f"{_PATH}, or delete it")

    def close(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, name: str, inputs: Mapping[str, object], make: Callable[[Path], object]) -> Path:
        """Make `name` once for these inputs and seal it.

        Args:
            name: the output's path inside the run folder.
            inputs: whatever decides the output: a Path is digested by content, anything else as JSON.
            make: writes the output at the path it is given (a temporary one).

        Returns:
            The output's final path.
        """
        path = self.folder / name
        seal_path = self.folder / SEALS / f"{name.replace('/', '--')}.json"
        want = {k: digest_file(v) if isinstance(v, Path) else digest_json(v) for k, v in sorted(inputs.items())}
        if path.exists() and seal_path.exists():
            try:
                seal = json.loads(seal_path.read_text())
            except ValueError:
                seal = {}
            if seal == {"inputs": want, "output": digest_file(path)}:
                self.skipped.append(name)
                return path
        with writing(self.folder):
            seal_path.unlink(missing_ok=True)  # a new output must never meet the old seal
        write_atomically(path, make)
        write_json(seal_path, {"inputs": want, "output": digest_file(path)})
        return path

    def sealed(self, name: str) -> bool:
        """Whether `name` was finished before (its inputs are not compared)."""
        return (self.folder / SEALS / f"{name.replace('/', '--')}.json").exists() and (self.folder / name).exists()
