"""What the browser page is made of: one file, and the runtimes that npm brings."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest

from xedge.benchmarks import vendor_browser
from xedge.errors import DeviceError, UsageError
from xedge.transports.browser import page_path
from xedge.transports.browser_server import policy


def test_the_page_is_one_file_and_its_policy_knows_its_scripts() -> None:
    page = page_path().read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 1
    said = policy(page.encode())
    assert f"'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in said
    assert "unsafe-eval'" in said.replace("wasm-unsafe-eval", "unsafe-eval")
    assert "'unsafe-eval'" not in said
    assert "http" not in said


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def npm(folder: Path, data: bytes, code: int = 0) -> None:
    """A program called npm that packs `data`, whatever is asked."""
    (folder / "archive").write_bytes(data)
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nat = sys.argv.index('--pack-destination') + 1\n"
        f"shutil.copy({str(folder / 'archive')!r}, sys.argv[at] + '/a.tgz')\n"
        f"print('npm error offline', file=sys.stderr)\nprint('a.tgz')\nsys.exit({code})\n"
    )
    script.chmod(0o755)


def test_vendoring_takes_the_pinned_archive_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive({"dist/a.js": b"wanted", "dist/b.js": b"not wanted", "../../evil": b"x"})
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    package = vendor_browser.Package("a", "1.0.0", "MIT", digest, {"dist/a.js": "ours.js"})
    monkeypatch.setattr(vendor_browser, "PACKAGES", (package,))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    place = tmp_path / "place"
    place.mkdir()
    npm(tmp_path, data)
    vendor_browser.vendor(place / "browser")
    assert {f.name for f in (place / "browser").iterdir()} == {"ours.js", "NOTICE.txt"}
    assert (place / "browser/ours.js").read_bytes() == b"wanted"
    assert vendor_browser.whole(place / "browser")
    npm(tmp_path, data + b"\0")
    with pytest.raises(DeviceError, match=r"a@1\.0\.0: npm brought another archive than the one pinned"):
        vendor_browser.vendor(place / "other")
    npm(tmp_path, data, code=1)
    with pytest.raises(DeviceError, match="npm failed: npm error offline"):
        vendor_browser.vendor(place / "other")
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(UsageError, match="npm is not installed"):
        vendor_browser.vendor(place / "other")
    assert [p.name for p in place.iterdir()] == ["browser"]


def test_every_pinned_file_is_one_the_page_asks_for_and_the_other_way_round() -> None:
    page = page_path().read_text()
    pinned = {name for package in vendor_browser.PACKAGES for name in package.files.values()}
    stems = set(re.findall(r'"(litert[\w.-]*\.js|ort\.[\w.]+\.mjs|ort-wasm-simd-threaded(?:\.\w+)?)"', page))
    stems |= {f"litert_wasm_{v}" for v in re.findall(r'"(\w*internal)"', page)}
    wanted = {s for s in stems if s.endswith(("js", "mjs"))}
    wanted |= {f"{s}.{'mjs' if s.startswith('ort') else 'js'}" for s in stems - wanted}
    wanted |= {f"{s}.wasm" for s in stems if not s.endswith(("js", "mjs"))}
    assert pinned == wanted
    assert all(len(base64.b64decode(package.integrity)) == 64 for package in vendor_browser.PACKAGES)
