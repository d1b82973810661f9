"""Pictures from files, as every command of xedge sees them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from xedge.errors import UsageError

# What PIL raises on damaged pictures, by decoder
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, struct.error, zlib.error)
UNREADABLE = (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning)
NO_RANGE = "floating-point pixels have no known range"


def decode(path: Path, *, alpha: bool = False) -> Image.Image:
    """A picture as RGB, upright by its EXIF tag; grey is repeated, 16 bits become 8.

    Args:
        path: the file.
        alpha: leave transparency, where the picture has any: RGBA then. It is dropped otherwise.

    Raises:
        UsageError: damaged, truncated, empty, or not a picture; the file is named.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # convert() would clip 16-bit grey at 255
                grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
                wide = picture.mode != "I" or grey.max() > 255
                picture = Image.fromarray(((grey + 128) // 257 if wide else grey).astype("u1"))
            if picture.mode == "F":
                raise ValueError(NO_RANGE)
            transparent = picture.has_transparency_data
            if transparent or picture.mode == "P":
                picture = picture.convert("RGBA")  # transparency of a palette needs the detour
            return picture if alpha and transparent else picture.convert("RGB")
    except UNREADABLE as e:
        raise unreadable(path, e) from e


def unreadable(path: Path, error: Exception) -> UsageError:
    """What a decoder raised, as one line that names the file."""
    if isinstance(error, OSError) and error.strerror:
        return UsageError(f"cannot be read ({error.strerror})", where=str(path), fix="check that path")
    reason = str(error).split("\n", 1)[0].replace(repr(str(path)), "the file")
    return UsageError(f"cannot be decoded ({reason})", where=str(path), fix="remove or replace the picture")
