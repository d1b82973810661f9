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
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system says into one line with a way out."""
    try:
        yield
    except OSError as e:
        fixes = {
            errno.ENOSPC: "free some space and run the same command again: it goes on where it stopped",
            errno.EDQUOT: "free some space and run the same command again: it goes on where it stopped",
            errno.EROFS: "choose a folder you may write with -o",
            errno.EACCES: "choose a folder you may write with -o",
            errno.EPERM: "choose a folder you may write with -o",
            errno.ENOTDIR: "choose another folder with -o",
            errno.EEXIST: "choose another folder with -o",
        }
        if e.errno not in fixes:
            raise
        raise UsageError(
            f"cannot write: {os.strerror(e.errno)}", where=str(e.filename or folder), fix=fixes[e.errno]
        ) from e


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
        if folder.exists() and not path.exists() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise UsageError(
                "is not empty and is no run folder of xedge", where=str(folder), fix="choose another folder with -o"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.close()
            raise UsageError(
                "another xedge is at work here", where=str(folder), fix="wait for it, or choose another folder with -o"
            ) from e
        # What a killed process left half-written has our temporary names; nothing else has.
        for p in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp"), *folder.glob("*/.*.old"), *folder.glob(".*.old")]:
            _remove(p)
        if path.exists():
            before = read_json(path)
            keys = sorted(k for k in {*before, *request} if before.get(k) != request.get(k))
            if keys:
                lock.close()
                diff = ", ".join(f"{k} was {before.get(k)!r} and now is {request.get(k)!r}" for k in keys)
                raise UsageError(
                    f"holds another run ({diff})", where=str(folder), fix="choose another folder with -o, or delete it"
                )
        else:
            write_json(path, dict(request))
        return cls(folder, request, [], lock)

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
