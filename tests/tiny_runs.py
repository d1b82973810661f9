"""Fixtures: weights for `tiny.net`, one finished run of it, and `xedge` in processes that start in no time.

Each call of `xedge` is a process of its own, forked from a server that has imported everything but run nothing, so
that signals, exit codes and streams are the real ones and a hundred of them cost seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import tiny
import tiny_pictures


@dataclass(frozen=True)
class Ended:
    """How a process ended; a signal is a negative code."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Started:
    """A process of `xedge` under way."""

    process: BaseProcess
    log: Path

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def reaches(self, condition: Callable[[], bool], timeout: float = 100) -> bool:
        """Whether it came true before the process ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if condition():
                return True
            if not self.process.is_alive():
                return condition()
            time.sleep(0.0005)
        self.kill()
        pytest.fail("waited in vain")

    def wait(self, timeout: float = 100) -> Ended:
        """Until it ends."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.kill()
            pytest.fail(f"still running after {timeout} s: {self.log.with_suffix('.err').read_text()}")
        return Ended(code, self.log.with_suffix(".out").read_text(), self.log.with_suffix(".err").read_text())


def _main(arguments: list[str], log: Path, folder: Path) -> None:
    for name, number in (("out", 1), ("err", 2)):
        fd = os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(fd, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    from xedge.cli import main

    main(arguments, prog_name="xedge")


@dataclass(frozen=True)
class Xedge:
    """The command line."""

    folder: Path
    context: multiprocessing.context.ForkServerContext  # type: ignore[name-defined]

    def start(self, *arguments: object) -> Started:
        """A process, not waited for."""
        log = self.folder / f"log-{time.monotonic_ns()}"
        process = self.context.Process(target=_main, args=([str(a) for a in arguments], log, self.folder))
        process.start()
        return Started(process, log)

    def __call__(self, *arguments: object) -> Ended:
        """A process, waited for."""
        return self.start(*arguments).wait()


@pytest.fixture(scope="session")
def xedge(tmp_path_factory: pytest.TempPathFactory) -> Xedge:
    """`xedge(*arguments)` runs the command line in an empty folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_server"])
    with pytest.MonkeyPatch.context() as patched:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patched.setenv(name, "1")
        patched.setenv("PYTHONPATH", str(tiny.HERE.parent))
        first = context.Process(target=int)  # starts the server, with this environment
        first.start()
        first.join()
    return Xedge(tmp_path_factory.mktemp("cwd"), context)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights of `tiny.net`."""
    return tiny.train(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture(scope="session")
def arguments(weights: Path) -> list[str]:
    """`xedge compress` of the tiny net: two cuts, one of them trained for two epochs."""
    words = ["compress", "-m", tiny.NET, "--weights", weights, "-d", tiny.DATA]
    words += ["--target", "jetson", "--target", "android"]
    words += ["--macs", "0.35", "--bits", "6", "--epochs", "2", "--iterations", "2", "--batch", "32", "--no-bench"]
    return [str(w) for w in words]


@pytest.fixture(scope="session")
def finished(xedge: Xedge, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted. Read it, do not write it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    ended = xedge(*arguments, "-o", folder)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def picture_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights of `tiny_pictures.net`."""
    return tiny_pictures.train(tmp_path_factory.mktemp("weights") / "pictures.safetensors")


@pytest.fixture(scope="session")
def restored(xedge: Xedge, picture_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a net that enlarges pictures, for three targets. Read it, do not write it."""
    folder = tmp_path_factory.mktemp("runs") / "pictures"
    words = ["compress", "-m", tiny_pictures.NET, "--weights", picture_weights, "-d", tiny_pictures.DATA]
    words += [w for t in ("jetson", "android", "host-cpu") for w in ("--target", t)]
    words += ["--macs", "0.5", "--bits", "6", "--epochs", "1", "--iterations", "1", "--max-drop", "3dB", "--no-bench"]
    ended = xedge(*words, "-o", folder)
    assert ended.code == 0, ended.err
    assert "PSNR" in ended.out
    return folder
