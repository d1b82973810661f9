"""Requests as the command lines that make them, quoted for a shell."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from xedge.request import Request

if TYPE_CHECKING:
    from xedge.request import Loaded

ALWAYS = ("criterion", "bits", "sensitivity", "epochs", "iterations", "lr", "batch", "seed")
"""Said even where they are what comes without asking: defaults may change."""


def command(loaded: Loaded) -> str:
    """The whole `xedge compress` of a request."""
    r = loaded.request
    words = ["xedge", "compress", "-m", r.model, "-d", r.data]
    for t in r.targets:
        words += ["--target", t]
    said = {"lr": loaded.lr, "batch": loaded.batch}
    for field in fields(Request):
        value = said.get(field.name, getattr(r, field.name))
        if field.name in ("model", "data", "targets") or (value == field.default and field.name not in ALWAYS):
            continue
        words += option(field.name, value)
    return shlex.join(words)


def option(name: str, value: Any) -> list[str]:
    """The words that give a field of a request a value; none for None."""
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, tuple):
        return [str(word) for row in value for word in (flag, *row)]
    return [flag, f"{value:g}" if isinstance(value, float) else str(value)]
