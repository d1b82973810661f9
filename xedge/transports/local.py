"""This host as a device: real files and real processes, no shell."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from xedge.errors import DeviceError, UsageError
from xedge.transports.base import Completed


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Local:
    """Files go to a private folder under the system's temporary folder, removed by `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="xedge-")

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def push(self, path: Path) -> str:
        try:
            digest = sha256(path)
            remote = self.folder / digest[:16] / path.name
            if remote.is_file() and sha256(remote) == digest:
                return str(remote)
            remote.parent.mkdir(exist_ok=True)
            part = remote.with_name(remote.name + ".part")
            shutil.copyfile(path, part)
            arrived = sha256(part)
            part.replace(remote)
        except OSError as error:
            raise UsageError(f"cannot copy to the device: {error.strerror or error}", where=str(path)) from error
        if arrived != digest:
            remote.unlink()
            raise DeviceError("arrived with another checksum", where=str(path), fix="check the disk and try again")
        return str(remote)

    def run(self, argv: Sequence[str], timeout: float) -> Completed:
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # its own process group, so that the whole tree can be ended
                cwd=self.folder,
            )
        except OSError as error:
            raise DeviceError(f"cannot start: {error.strerror or error}", where=argv[0]) from error
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"not done after {timeout:g} s, killed",
                where=" ".join(argv[:2]),
                fix="give it more time, or a smaller job",
            ) from error
        finally:  # also on Ctrl-C: children of a finished leader must not live on either
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        return Completed(tuple(argv), process.returncode, stdout, stderr)

    def pull(self, remote: str, path: Path) -> None:
        part = path.with_name(path.name + ".part")
        try:
            shutil.copyfile(remote, part)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DeviceError(f"cannot fetch {remote}: {error.strerror or error}", where=str(path)) from error

    def facts(self) -> dict[str, str]:
        return {
            "system": f"{platform.system()} {platform.release()}",
            "machine": platform.machine(),
            "python": platform.python_version(),
        }

    def close(self) -> None:
        self._folder.cleanup()
