"""What options take: fractions, drops, times, sizes of pictures and of files."""

from __future__ import annotations

import re
from typing import Any

import click


class Percent(click.ParamType[float]):
    """A fraction: 0.005 or 0.5%."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is neither a fraction nor a percentage", param, ctx)


FRACTION = Percent()


class QualityDrop(Percent):
    """A fraction, 0.005 or 0.5%, or decibels, 0.2dB."""

    name = "drop"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse; decibels stay text."""
        text = str(value).strip()
        if not text.endswith("dB"):
            return super().convert(value, param, ctx)
        try:
            return f"{float(text[:-2]):g}dB"
        except ValueError:
            self.fail(f"{value!r} is no drop such as 0.2dB", param, ctx)


DROP = QualityDrop()


class Duration(click.ParamType[float]):
    """Milliseconds: 30ms, 0.03s, 800us or a bare 30."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        number, factor = str(value).strip(), 1.0
        for unit, scale in (("ms", 1.0), ("us", 1e-3), ("s", 1e3)):
            if number.endswith(unit):
                number, factor = number.removesuffix(unit), scale
                break
        try:
            time = float(number) * factor
        except ValueError:
            time = 0.0
        if not 0 < time < float("inf"):
            self.fail(f"{value!r} is no time such as 30ms", param, ctx)
        return time


DURATION = Duration()


class PictureSize(click.ParamType[tuple[int, int]]):
    """Width and height in pixels: 1280x720."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(value).strip())
        if found is None or min(size := (int(found[1]), int(found[2]))) < 1:
            self.fail(f"{value!r} is no size such as 1280x720", param, ctx)
        return size


PICTURE = PictureSize()


class Size(click.ParamType[int]):
    """Bytes: 300000, 300kB, 1.5MB, 256KiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse."""
        found = re.fullmatch(r"([\d.]+)\s*(|B|kB|KB|MB|KiB|MiB)", str(value).strip())
        units = {"kB": 1000, "KB": 1000, "MB": 1000**2, "KiB": 1024, "MiB": 1024**2}
        try:
            return int(float(found[1]) * units.get(found[2], 1)) if found else int(value)
        except ValueError:
            self.fail(f"{value!r} is no size such as 300kB", param, ctx)


SIZE = Size()
