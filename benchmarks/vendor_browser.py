"""Fetch what the browser page runs, LiteRT.js and ONNX Runtime Web, from npm: python -m xedge.benchmarks.vendor_browser

Run once in a source checkout; a wheel built afterwards holds the files, which are not committed. npm only downloads:
nothing of a package is executed, and each archive must have the SHA-512 written here.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xedge.errors import DeviceError, UsageError, XedgeError

FOLDER = Path(__file__).parent / "browser"


@dataclass(frozen=True)
class Package:
    """One npm package at one version.

    Attributes:
        integrity: base64 of the archive's SHA-512, as in a package-lock.json.
        files: path in the archive -> name in `FOLDER`.
    """

    name: str
    version: str
    licence: str
    integrity: str
    files: Mapping[str, str]


def _pair(folder: str, stem: str, script: str) -> dict[str, str]:
    """An Emscripten module: its script and its WebAssembly."""
    return {f"{folder}/{name}": name for name in (f"{stem}.{script}", f"{stem}.wasm")}


PACKAGES = (
    Package(
        "@litertjs/core",
        "2.5.3",
        "Apache-2.0, Copyright Google LLC",
        "PlGmbMOq9WitX7FO0jhbdJw9GthatsyuCQXjTt/wJZo0FLaw48q4tz8IwqgqCIkviYGr9OFDL1kCnN4nzWoyJQ==",
        {
            "dist/index.js": "litert.js",
            **_pair("wasm", "litert_wasm_internal", "js"),
            **_pair("wasm", "litert_wasm_threaded_internal", "js"),
            **_pair("wasm", "litert_wasm_compat_internal", "js"),
        },
    ),
    Package(
        "@litertjs/wasm-utils",
        "2.5.3",
        "Apache-2.0, Copyright Google LLC",
        "4fJiw6tBQnIs+0jH/OQ16nYOiSl8/+zZnn5h2ul8aTKHi05sVqZW580Tmk78pC2kT39A9OYBVdFawteZ/sI1kQ==",
        {"dist/index.js": "litert-wasm-utils.js"},
    ),
    Package(
        "onnxruntime-web",
        "1.30.0",
        "MIT, Copyright (c) Microsoft Corporation",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
            "dist/ort.webgpu.min.mjs": "ort.webgpu.min.mjs",
            **_pair("dist", "ort-wasm-simd-threaded", "mjs"),
            **_pair("dist", "ort-wasm-simd-threaded.asyncify", "mjs"),
        },
    ),
)

_MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def notice() -> str:
    """Whose files these are, and MIT's text; Apache's is xedge's own licence."""
    rows = (f"{p.name} {p.version}: {p.licence}\n  {' '.join(p.files.values())}\n" for p in PACKAGES)
    return "Unchanged files of npm packages.\n\n" + "\n".join(rows) + "\nMIT License\n\n" + _MIT


def versions() -> dict[str, str]:
    """Of the two runtimes, by the names that measurements give them."""
    made = {package.name: package.version for package in PACKAGES}
    return {"litert": made["@litertjs/core"], "onnxruntime": made["onnxruntime-web"]}


def whole(folder: Path = FOLDER) -> bool:
    """Whether every file is there, of these versions."""
    try:
        return (folder / "NOTICE.txt").read_text(encoding="utf-8") == notice()
    except OSError:
        return False


def vendor(folder: Path = FOLDER) -> None:
    """Make `folder`, which appears whole or not at all. UsageError without npm, DeviceError where npm fails."""
    if shutil.which("npm") is None:
        raise UsageError("npm is not installed", fix="sudo apt-get install npm")
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".browser-") as place:
            made = Path(place, "made")
            made.mkdir()
            for package in PACKAGES:
                unpack(package, fetch(package, Path(place)), made)
            (made / "NOTICE.txt").write_text(notice(), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror or error}", where=str(folder.parent)) from error


def fetch(package: Package, folder: Path) -> bytes:
    """The archive that npm downloads into `folder`, checked. DeviceError where it is another, or none comes."""
    spec = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        raise DeviceError("npm took more than 600 s", where=spec, fix="check the network") from None
    name = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not name:
        said = [line for line in done.stderr.splitlines() if line.strip() and " warn " not in line][-1:]
        raise DeviceError(f"npm failed: {said[0] if said else done.returncode}", where=spec, fix="check the network")
    data = (folder / Path(name[0]).name).read_bytes()
    if hashlib.sha512(data).digest() != base64.b64decode(package.integrity):
        raise DeviceError("npm brought another archive than the one pinned", where=spec, fix="do not use it")
    return data


def unpack(package: Package, data: bytes, folder: Path) -> None:
    """Write the files of `package` that are wanted, under names of our own."""
    archive = folder.parent / "archive.tgz"
    archive.write_bytes(data)
    with tarfile.open(archive) as tar:
        for path, name in package.files.items():
            file = tar.extractfile(f"package/{path}")
            assert file is not None, path
            (folder / name).write_bytes(file.read())


def main() -> int:
    """Fetch, unless all is there."""
    try:
        if not whole():
            vendor()
    except XedgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"{FOLDER}: {', '.join(f'{p.name} {p.version}' for p in PACKAGES)}, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
