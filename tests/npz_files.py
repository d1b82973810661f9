"""Thirty small images with labels, and .npz files of what a test wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np

X = np.random.default_rng(2).normal(size=(30, 3, 4, 5)).astype(np.float32)
Y = np.arange(30) % 3


def saved(at: Path, **arrays: np.ndarray) -> str:
    np.savez(at / "d.npz", **arrays)  # type: ignore[arg-type]
    return str(at / "d.npz")
