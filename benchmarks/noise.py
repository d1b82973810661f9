"""Figure 6(b) of the paper: top-1 of an original and of its pruned net under growing Gaussian noise on the input.

    python -m xedge.benchmarks.noise RUN [RUN ...] --plot FILE.png

RUN is a folder of `xedge compress` on labelled data. The deviation is in units of the normalised input's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from xedge.data import Images, batches, fitting
from xedge.metrics import topk
from xedge.pipeline import rebuild
from xedge.request import Request, load_everything
from xedge.run import read_json

DEVIATIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@torch.no_grad()
def answers(model: nn.Module, images: Images, deviation: float) -> tuple[Tensor, Tensor]:
    """Logits and labels of the noisy images; the same noise for every model."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = [], []
    for x, y in batches(images, fitting(images[0][0].shape)):
        logits.append(model(x + deviation * torch.randn(x.shape, generator=draw)))
        labels.append(y)
    return torch.cat(logits), torch.cat(labels)


def plot(rows: Mapping[tuple[str, str, int], Sequence[float]], path: Path) -> None:
    """A panel a net, a line a seed. `rows`: (net, original or pruned, seed) -> top-1 at each deviation."""
    mpl.use("agg")
    nets = list(dict.fromkeys(net for net, _, _ in rows))
    figure = Figure(figsize=(3.6 * len(nets), 3.0), layout="constrained")
    panels = figure.subplots(1, len(nets), sharey=True, squeeze=False)[0]
    for panel, net in zip(panels, nets, strict=True):
        for which, look in (("original", "C7--"), ("pruned", "C0-")):
            lines = [row for (n, w, _), row in rows.items() if (n, w) == (net, which)]
            for i, row in enumerate(lines):
                label = which if i == 0 else None
                panel.plot(DEVIATIONS, [100 * v for v in row], look, marker=".", label=label)
        panel.set(title=net, xlabel="deviation of the noise")
        panel.legend(frameon=False)
    panels[0].set(ylabel="top-1, %")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    print("| top-1, % under noise of deviation | " + " | ".join(f"{d:g}" for d in DEVIATIONS) + " |")
    print("|---" * (len(DEVIATIONS) + 1) + "|")
    rows: dict[tuple[str, str, int], list[float]] = {}
    for run in arguments.runs:
        request = Request.from_json(read_json(run / "run.json"), str(run))
        loaded = load_everything(request)
        original = loaded.factory()
        original.load_state_dict(load_file(run / "original.safetensors"))
        for name, model in (("original", original.eval()), ("pruned", rebuild(run))):
            row = [topk(*answers(model, loaded.data.val, d)) for d in DEVIATIONS]
            cells = " | ".join(f"{100 * v:.1f}" for v in row)
            print(f"| {request.model}, seed {request.seed}, {name} | {cells} |", flush=True)
            rows[request.model, name, request.seed] = row
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
