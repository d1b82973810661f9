"""LPIRC's rules on the device this file was pushed to: pictures in, one class each, against the clock. Python 3.8+.

    python lpirc_agent.py --agent agent.py --model F --runtime litert --pictures A.zip [--pictures B.zip ...]
                          --resize 256 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225

Pictures are files in zips, in order of their names. For each the clock runs over reading, decoding (Pillow), resizing
the shorter side, the centre crop, normalising, `invoke` and the highest output. The model is loaded, and run once on
zeros, before the clock starts. Nothing is judged here. The output is JSON, one object a line, ended as agent.py's is:

    {"kind": "facts", "when": "before", ...}
    {"kind": "pictures", "first": 0, "class": [...], "end_ns": [...]}   class -1: not a picture; ns since the start
    {"kind": "facts", "when": "after", ...}
    {"kind": "end", "lines": n}

Errors are as agent.py's: one line, exit code 2 for a bad request, 3 where the runtime or Pillow is not installed, 4
where the runtime refuses the model or fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

EVERY = 64
"""Pictures in a line."""


def sibling(path: str) -> Any:
    """agent.py as a module, wherever it was pushed."""
    spec = importlib.util.spec_from_file_location("agent", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["agent"] = module
    spec.loader.exec_module(module)
    return module


def tables(mean: list[float], std: list[float], dtype: Any, grid: tuple[float, int]) -> Any:
    """What each of the 256 values of each channel becomes: [3, 256] of the input's type."""
    real = (np.arange(256) / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    if np.dtype(dtype).kind == "f":
        return real.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(real / grid[0]) + grid[1], limits.min, limits.max).astype(dtype)


def prepared(image: Any, data: bytes, resize: int, side: int) -> Any:
    """uint8 [side, side, 3] of a picture file; None where it is none. As torchvision's Resize and CenterCrop."""
    try:
        with image.open(io.BytesIO(data)) as file:
            picture = file.convert("RGB")
    except Exception:  # decoders raise anything on damaged files
        return None
    width, height = picture.size
    short = min(width, height)
    size = (resize * width // short, resize * height // short)
    picture = picture.resize(size, image.BILINEAR)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def work(wish: argparse.Namespace, agent: Any, say: Callable[[dict[str, Any]], None]) -> None:
    """Do what the command line asks."""
    try:
        import PIL
        from PIL import Image
    except ImportError as error:
        raise agent.AgentError(f"Pillow is not installed here, which decodes the pictures ({error})", 3) from error
    model = agent.load(wish.model, wish.runtime, wish.threads)
    if len(model.inputs) != 1 or len(model.inputs[0][1]) != 4:
        raise agent.AgentError("the model does not take one picture", 2)
    _, shape, dtype = model.inputs[0]
    last = shape[3] == 3
    side = shape[1] if last else shape[2]
    if shape not in ((1, side, side, 3), (1, 3, side, side)) or wish.resize < side:
        raise agent.AgentError(f"the model takes {list(shape)}, and --resize is {wish.resize}", 2)
    table = tables(wish.mean, wish.std, dtype, model.grid)
    channels = np.arange(3)
    blank = np.zeros(shape, dtype)
    model.set([blank])
    model.invoke()
    before = agent.first_facts(wish.model, wish.runtime, model, wish.threads, 0)
    say({**before, "pillow": PIL.__version__, "classes": int(np.size(model.output()))})
    clock = time.perf_counter_ns
    classes, ends, first = [], [], 0
    start = clock()
    for pack in wish.pictures:
        with zipfile.ZipFile(pack) as pictures:
            for name in sorted(pictures.namelist()):
                pixels = prepared(Image, pictures.read(name), wish.resize, side)
                if pixels is None:
                    classes.append(-1)
                else:
                    x = table[channels, pixels]
                    model.set([np.ascontiguousarray(x if last else x.transpose(2, 0, 1))[None]])
                    model.invoke()
                    classes.append(int(np.argmax(model.output())))
                ends.append(clock() - start)
                if len(ends) == EVERY:
                    say({"kind": "pictures", "first": first, "class": classes, "end_ns": ends})
                    classes, ends, first = [], [], first + EVERY
    if ends:
        say({"kind": "pictures", "first": first, "class": classes, "end_ns": ends})
    say(agent.facts("after"))


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description="LPIRC's rules on this device.")
    for flag in ("--agent", "--model", "--runtime"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--pictures", action="append", required=True)
    parser.add_argument("--resize", type=int, required=True)
    for flag in ("--mean", "--std"):
        parser.add_argument(flag, type=lambda text: [float(v) for v in text.split(",")], required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus")
    wish = parser.parse_args(argv)
    agent = sibling(wish.agent)
    return int(agent.told(lambda say: work(agent.pinned(wish), agent, say)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
