"""What the splits of a data set hold, and whether an image is in two of them; a fixture: a cache with nothing in it."""

from __future__ import annotations

import hashlib

import pytest
from torch import Tensor

from xedge.data import Data, Images, take

SPLITS = ("train", "select", "val")


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def everything(dataset: Images) -> tuple[Tensor, Tensor]:
    return take(dataset, range(len(dataset)))


def hashes(dataset: Images) -> list[str]:
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in everything(dataset)[0]]


def assert_no_image_is_in_two_splits(data: Data) -> None:
    found = {name: set(hashes(getattr(data, name))) for name in SPLITS}
    assert not found["train"] & found["select"]
    assert not found["train"] & found["val"]
    assert not found["select"] & found["val"]
