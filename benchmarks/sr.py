"""Super-resolution, denoising and deblocking side by side: all nets trained for the same steps on the same photographs.

    python -m xedge.benchmarks.photographs PHOTOS
    python -m xedge.benchmarks.sr OUT PHOTOS

SRResNet with nearest neighbours (X-SRResNet) is trained for half of the steps, pruned to 1/4, 1/8 and 1/14 of its
multiply-adds by xedge's default, by the paper's DI, by L1 and by Taylor's (torch-pruning), and trained for the other
half, as is itself and every other net. Judged on pictures that no training saw: photographs of the folder without a
near copy among the rest, and scikit-image's and scikit-learn's own. Each net is quantised to 8 bits after that, without
training, and its files for LiteRT and ONNX Runtime are judged as they run. Latencies come last, every net interleaved
with X-SRResNet; `--no-time` leaves them for a later call, on a quiet machine. Rows that are there are not measured
again, and a killed training goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xedge import load
from xedge.benchmarks.peers_pruning import Case, ours, theirs
from xedge.benchmarks.rows import Rows
from xedge.data import Data, batches
from xedge.decode import decode
from xedge.device import open_device
from xedge.export import write_flavour
from xedge.image_metrics import psnr, ssim
from xedge.measure import QUICK, compare
from xedge.metrics import macs, parameters
from xedge.models.feqe import feqe
from xedge.models.hsrn import hsrn
from xedge.models.span import span
from xedge.models.srcnn import dncnn, srcnn, vdsr
from xedge.models.srresnet import x_srresnet
from xedge.models.upscale import Bicubic
from xedge.onnx_graph import export_float
from xedge.quantize import quantize
from xedge.ranges import calibrate, for_pictures
from xedge.target import Target
from xedge.train import Recipe, fit

HELD_OUT = {
    "032-nature-Dune.png": "61ec1a7375c6d70699c824cfe1f7fa534d94e97db4ebcee926fb4aa75c0e75ff",
    "034-nature-Garden.png": "096a8c2a88063a2ef18471a5bc30287dbcecebaa26526ced7b7f9305dd437fad",
    "036-nature-LadyBird.png": "35bb9de7353d0d70379e85ceff494ad9cdb6874423abd05d8c0228d2400a6fa3",
    "039-nature-TwoWings.png": "819965793b87a36110feb348a3891493d6957e572ab9b80305c7a65a41dab766",
    "044-images-2560x1600.png": "4aa32128d519eb7bdda925132624ab3b7c640dac854bbf52d4b8aadab689d1cf",
    "049-images-2560x1600.png": "f70c391e48213d50b0817efea18068b61aa5a7d14b873d8834163a9abe867841",
    "052-images-2560x1600.png": "84173041eabd2a17c9ffb4855384fc062a8bf3ce5024daf96b9c7b214dcdb1ed",
    "057-images-2560x1600.png": "f860e1a6179957256a53b967597c4839223e332c19c23d48c273424756193097",
    "065-images-2560x1600.png": "dbd59fc512921e38e76144a8f67ea9e90b4fd461888688148430d82a5e9d48cd",
    "073-images-5120x2880.png": "ae55519a23468215c8fe7ad57072f64d8362ee4d6e7fd21700fa1bb7e838a892",
}
"""Photographs of `benchmarks.photographs` without a near copy among the rest, and the SHA-256 of their pixels."""
PACKAGES = "gnome-backgrounds 43.1-1, mate-backgrounds 1.26.0-1, plasma-workspace-wallpapers 4:5.27.5-2"
"""Debian's, that they were made from."""
EPOCHS = 4
"""Of the first part of the training, by default half of it: what a kill costs at most is one of them."""
BATCH = 16
RATES = (1e-3, 2e-3)
"""Of the parts. In so few steps 2e-3 was better than 5e-4 for the second, for FEQE as for the pruned nets; a base of
64 channels without batch norms does not survive it, and keeps the first's."""
CALIBRATED = 32
SIDE = {"sr": 144, "denoise": 256, "deblock": 256}
"""Of the middle of a held-out picture that is judged, and of the files: what fits into the smallest picture."""
HD = 720 * 1280
"""Pixels of the output that multiply-adds are given for."""

Make = Callable[[], nn.Module]
BASE, WIDE = "X-SRResNet", "wide X-SRResNet"
SR: Mapping[str, Make] = {
    "SRCNN": lambda: srcnn(2),
    "VDSR, 10 layers of 24": lambda: vdsr(2, depth=10, width=24),
    "FEQE": lambda: feqe(2),
    "SPAN, 3 blocks of 16": lambda: span(2, blocks=3, width=16),
    BASE: lambda: x_srresnet(2, blocks=8, width=32),
    f"{BASE} of 8 channels": lambda: x_srresnet(2, blocks=8, width=8),
    WIDE: lambda: x_srresnet(2, blocks=16, width=64, norms=False),
}
RESTORERS: Mapping[str, Make] = {  # 53.1 k multiply-adds a pixel, all
    "DnCNN, 12 layers of 24": lambda: dncnn(1, depth=12, width=24),
    "DnCNN without batch norms": lambda: vdsr(1, depth=12, width=24),
    "HSRN, 3 blocks of 24": lambda: hsrn(1, blocks=3, width=24),
}
PARTS = (4, 8, 14)
METHODS: Mapping[str, dict[str, Any] | str] = {
    "xedge": {},
    "the paper's DI": {"criterion": "diloss", "allocation": "uniform", "fold": False},
    "L1": "MagnitudeImportance",
    "Taylor": "TaylorImportance",
}
PRUNED = {f"{BASE} / {part}, {method}": (BASE, part, 1, method) for part in PARTS for method in METHODS}
PRUNED |= {f"{WIDE} / 14, {method}": (WIDE, 14, 16, method) for method in METHODS}
"""Name -> the net that is cut, to what part of its multiply-adds, widths' multiples, and how. A fourteenth of the wide
one are 16 channels nearly everywhere, which kernels like: with 17 it takes twice the time."""
PLAIN = {"sr": "bicubic", "denoise": "the input itself", "deblock": "the input itself"}
ORDER = (*dict.fromkeys(PLAIN.values()), *SR, *RESTORERS, *PRUNED)
NARROW = f"^(?!{WIDE})"
"""All nets but the wide one, of the papers' 16 blocks of 64 channels, without batch norms: it takes hours to train."""
RUNTIMES = {"LiteRT": "android", "ONNX Runtime": "host-cpu"}
PROTOCOL = replace(QUICK, name="quick, 8 runs", min_runs=8, seconds=0.3, warmup_cap_seconds=4.0)


# -- the data --------------------------------------------------------------------------------------------------------


def test_pictures(photographs: Path, out: Path) -> Path:
    """The held-out pictures as one folder; ends the program where the photographs are not those of HELD_OUT."""
    from skimage import data as theirs_
    from sklearn.datasets import load_sample_image

    folder = out / "test"
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in HELD_OUT.items():
        found = photographs / name
        if not found.is_file():
            sys.exit(f"sr: {photographs} has no {name}; make it by python -m xedge.benchmarks.photographs")
        if hashlib.sha256(decode(found).tobytes()).hexdigest() != digest:
            sys.exit(f"sr: {found} is not the picture of the recorded figures, which needs Debian's {PACKAGES}")
        shutil.copyfile(found, folder / name)
    own = {f"skimage-{n}": getattr(theirs_, n)() for n in ("astronaut", "chelsea", "coffee", "rocket")}
    own |= {f"sklearn-{n}": load_sample_image(f"{n}.jpg") for n in ("china", "flower")}
    for name, picture in own.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def data_of(task: str, level: int, before: int, photographs: Path, test: Path) -> tuple[Data, Data]:
    """Training pairs, so many that EPOCHS of them are the steps of the first part; and larger ones that calibrate the
    files."""
    kind = {"sr": "scale", "denoise": "sigma", "deblock": "q"}[task]
    spec = f"{task}:{photographs}?{kind}={level}&test={test}&patch={32 if task == 'sr' else 48}"
    count = len(load.load_data(f"{spec}&patches=1", root=None, seed=0).train)
    patches = math.ceil(before / EPOCHS * BATCH / count)
    large = re.sub(r"patch=\d+", f"patch={SIDE[task]}&patches=1", spec)
    small, whole = (load.load_data(s, root=None, seed=0) for s in (f"{spec}&patches={patches}", large))
    return small, whole


@torch.no_grad()
def judged(run: Callable[[Tensor], Tensor], data: Data) -> tuple[float, float]:
    """PSNR and SSIM, means over the middles of the held-out pictures: of Y, with `scale` pixels shaved, for
    super-resolution; of Y for deblocking; of RGB for denoising."""
    task, _, scale = *data.name.partition(":")[:2], data.scale or 1
    on_y, shave = task != "denoise", scale if task == "sr" else 0
    found = []
    for picture in data.pictures:
        small, truth = picture.load()
        top, left = ((n - SIDE[task]) // 2 for n in small.shape[:2])

        def middle(whole: Any, k: int, top: int = top, left: int = left) -> Tensor:
            part = whole[k * top : k * (top + SIDE[task]), k * left : k * (left + SIDE[task])]
            return torch.from_numpy(part.transpose(2, 0, 1).astype(np.float32) / np.float32(255))

        wanted, got = middle(truth, scale), run(middle(small, 1)[None])[0]
        found.append([f(wanted, got, shave=shave, on_y=on_y) for f in (psnr, ssim)])
    means = np.mean(found, 0)
    return float(means[0]), float(means[1])


# -- nets ------------------------------------------------------------------------------------------------------------


def half(
    model: nn.Module, which: int, data: Data, path: Path, *,
    frozen: bool = False, seed: int = 0, epochs: int = EPOCHS, rate: float | None = None,
) -> nn.Module:  # fmt: skip
    """Train for one part of the steps, once; with `frozen` batch norms keep their statistics, as `xedge compress` does.

    `rate` is by default that of RATES.
    """
    if not path.exists():
        lr = RATES[which] if rate is None else rate
        recipe = Recipe(epochs=epochs, lr=lr, batch=BATCH, frozen_norms=frozen, seed=seed + which)
        checkpoint = path.with_suffix(".checkpoint")
        resumed, started = checkpoint.exists(), time.monotonic()
        fit(model, data, recipe, checkpoint=checkpoint)
        took = {} if resumed else {"seconds": f"{time.monotonic() - started:.1f}"}
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=took)
        checkpoint.unlink(missing_ok=True)
    model.load_state_dict(load_file(path))
    return model.eval()


def seconds(*halves: Path) -> float | None:
    """Of all the training behind a net; None where some of it was interrupted."""
    total = 0.0
    for path in halves:
        with safe_open(path, "pt") as file:
            took = (file.metadata() or {}).get("seconds")
        if took is None:
            return None
        total += float(took)
    return total


def pruned(model: nn.Module, data: Data, part: int, align: int, method: str) -> nn.Module:
    """One cut to 1 / part of the multiply-adds, with widths in multiples of `align`."""
    case = Case(macs=1 / part, align=align, base_epochs=0, images=0, lr=0.0, felt=128)
    how = METHODS[method]
    return theirs(model, data, case, 0, how) if isinstance(how, str) else ours(model, data, case, 0, how)


def files(model: nn.Module, large: Data, folder: Path) -> dict[str, Path]:
    """Float and int8 files for both runtimes, of the size that is judged."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = export_float(model, large.shape, 17)
    made = {}
    seen = calibrate(proto, lambda: (x.numpy() for x, _ in batches(large.train, 1, shuffle_seed=0, limit=CALIBRATED)))
    table = quantize(proto, for_pictures(proto, seen), mean_bits=8.0)
    for runtime, name in RUNTIMES.items():
        target: Target = load.load_target(name)
        for kind, graph in (("float", proto), ("int8", write_flavour(proto, table, target.flavour))):
            source = folder / f"{kind}.{target.flavour}.onnx"
            onnx.save(graph, source)
            made[f"{runtime} {kind}"] = target.compile(
                source, folder, kind if target.suffix != ".onnx" else f"{kind}-ort"
            )
    return made


def measured(model: nn.Module, data: Data, large: Data, folder: Path) -> dict[str, Any]:
    """What a row says of a net; its files stay in `folder`."""
    sized = macs(model, (3, 32, 32)).total * HD / (32 * (data.scale or 1)) ** 2
    row = {"parameters": parameters(model), "macs": sized, "float": judged(model, data)}
    made = files(model, large, folder)
    row["files"] = {key: f"{folder.name}/{path.name}" for key, path in made.items()}
    for runtime, target in RUNTIMES.items():
        run = load.load_target(target).load(made[f"{runtime} int8"], 1)
        row[runtime] = judged(lambda x, run=run: torch.from_numpy(run(x.numpy())), data)  # type: ignore[misc]
    return row


def slug(name: str) -> str:
    """A name as files have it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


# -- tables ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], times: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Markdown."""
    clocked = any(row.get("training seconds") for row in rows)
    heads = ["net", "G multiply-adds", "k parameters", "PSNR, dB", "SSIM"]
    heads += [head for r in RUNTIMES for head in (f"int8 in {r}, dB", "SSIM")]
    heads += ["training, s"] * clocked + [f"{r}, ms: float / int8" for r in RUNTIMES if times]
    lines = [f"| {rows[0]['task']}, {rows[0]['notes']}: {' | '.join(heads)} |", "|---" * len(heads) + "|"]

    def milliseconds(net: str, file: str) -> str:
        found = times.get((net, file))
        return f"{found['ms']:.1f}" + ("" if found["verdict"] == "ok" else "?") if found else ""

    for row in sorted(rows, key=lambda row: ORDER.index(row["net"])):
        cells = [row["net"]]
        cells += [f"{row['macs'] / 1e9:.2f}", f"{row['parameters'] / 1e3:.1f}"] if row["parameters"] else ["", ""]
        for quality in (row["float"], *(row.get(r) for r in RUNTIMES)):
            cells += [f"{quality[0]:.2f}", f"{quality[1]:.4f}"] if quality else ["", ""]
        if clocked:
            cells.append(f"{took:.0f}" if (took := row.get("training seconds")) else "")
        for r in RUNTIMES if times else ():
            pair = [milliseconds(row["net"], f"{r} {kind}") for kind in ("float", "int8")]
            cells.append(" / ".join(pair) if any(pair) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(
    task: str, level: int, steps: int, before: int, nets: str, photographs: Path, test: Path, out: Path, rows: Rows
) -> str:
    """All rows of one task whose nets match `nets`, `before` of the steps before the cut; returns its note, which names
    it."""
    data, large = data_of(task, level, before, photographs, test)
    note = f"{data.notes[0]}, {steps} steps" + (f", {before} before the cut" if 2 * before != steps else "")
    key, later = slug(note), round(EPOCHS * (steps - before) / before)

    about = {"task": task, "notes": note}

    def full(name: str, model: nn.Module, first: Path | None = None) -> None:
        if rows.has(notes=note, net=name):
            return
        where = out / f"{key}-{slug(name)}"
        halves = (first or where.with_suffix(".0.safetensors"), where.with_suffix(".1.safetensors"))
        if first is None:
            half(model, 0, data, halves[0])
        # DnCNN has not yet come so far by then that its statistics could stay.
        rate = RATES[0] if name == WIDE else None
        half(model, 1, data, halves[1], frozen=task == "sr", epochs=later, rate=rate)
        took = {"training seconds": seconds(*halves)}
        rows.add({**about, "net": name, **took, **measured(model, data, large, where)})

    def fresh(make: Make) -> nn.Module:
        torch.manual_seed(0)
        return make()

    name = PLAIN[task]
    if not rows.has(notes=note, net=name):
        plain = {"parameters": 0, "macs": 0, "float": judged(nn.Identity(), data)} if task != "sr" else None
        rows.add({**about, "net": name, **(plain or measured(Bicubic(2), data, large, out / f"{key}-{name}"))})
    for name, make in (SR if task == "sr" else RESTORERS).items():
        if re.search(nets, name):
            full(name, fresh(make))
    for name, (base, part, align, method) in PRUNED.items() if task == "sr" else ():
        if re.search(nets, name) and not rows.has(notes=note, net=name):
            trained = out / f"{key}-{slug(base)}.0.safetensors"
            whole = half(fresh(SR[base]), 0, data, trained)
            full(name, pruned(whole, data, part, align, method), trained)
    return note


def timed(out: Path, rows: Rows, times: Rows) -> None:
    """Each net's files interleaved with X-SRResNet's, or with FEQE's where that is not there."""
    nets = {row["net"]: row for row in rows.done if row["task"] == "sr" and "files" in row}
    with open_device("local", say=print) as device:
        beside = BASE if BASE in nets else "FEQE"
        for net in (n for n in ORDER if n in nets and n != beside):
            for key, path in nets[net]["files"].items():
                if times.has(net=net, file=key):
                    continue
                found = compare(device, out / nets[beside]["files"][key], out / path, PROTOCOL)
                ratio = found.ratio
                base = found.a.interval.median
                facts = {"verdict": found.verdict, "ratio": [ratio.median, ratio.lower, ratio.upper], "base": base}
                times.add({"net": net, "beside": beside, "file": key, "ms": found.b.interval.median, **facts})


def clock(times: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """By net and file. X-SRResNet, or FEQE, was measured beside every other net: the median of what held."""
    found = {(t["net"], t["file"]): t for t in times}
    bases: dict[tuple[str, str], list[float]] = {}
    for t in times:
        if t["verdict"] == "ok":
            bases.setdefault((t.get("beside", BASE), t["file"]), []).append(t["base"])
    return found | {key: {"ms": median(of), "verdict": "ok"} for key, of in bases.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("photographs", type=Path, help="folder made by python -m xedge.benchmarks.photographs")
    parser.add_argument("--tasks", nargs="+", choices=list(SIDE), default=list(SIDE))
    parser.add_argument("--steps", type=int, default=1600, help="of every net; denoising and deblocking take half")
    parser.add_argument("--before", type=int, help="of these before the cut  [half]")
    parser.add_argument("--nets", default=NARROW, help="only those whose name this expression finds")
    parser.add_argument("--no-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out
    test = test_pictures(arguments.photographs, out)
    rows, times = Rows(out / "rows.jsonl"), Rows(out / "times.jsonl")
    levels = {"sr": (2,), "denoise": (30, 50), "deblock": (10, 20, 30)}
    notes = []
    for task, level in [(t, of) for t in arguments.tasks for of in levels[t]]:
        less = 1 if task == "sr" else 2
        steps, before = arguments.steps // less, (arguments.before or arguments.steps // 2) // less
        notes.append(compared(task, level, steps, before, arguments.nets, arguments.photographs, test, out, rows))
    if "sr" in arguments.tasks and not arguments.no_time:
        timed(out, rows, times)
    for note in notes:
        found = [row for row in rows.done if row["notes"] == note]
        print("\n" + table(found, clock(times.done) if found[0]["task"] == "sr" else {}) + "\n", flush=True)


if __name__ == "__main__":
    main()
