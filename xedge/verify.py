"""Is every artefact the quantised model? Each is run on validation data and compared with the torch judge."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from xedge.data import batches, fitting
from xedge.errors import InternalError
from xedge.metrics import agreement, kl, snr_db, topk
from xedge.quantize import ScaleTable
from xedge.simulate import Quantized
from xedge.train import predict

if TYPE_CHECKING:
    from xedge.progress import Talk
    from xedge.request import Loaded

JUDGED = 512
"""Validation images on which artefact and judge are compared."""
REPORTED = 10_000
"""Validation images at most on which an artefact's accuracy is taken."""
JITTER = 0.5
"""Steps by which a correct kernel may round differently: it sums in another order, and may round twice."""
JITTERED = 128
MARGIN = 6.0
"""dB below the noise of such jitter on every tensor, that is, one step everywhere, at which an artefact is wrong."""
MOST = 30.0
"""dB that are always enough: a scale that is wrong by a tenth in one layer leaves 20 dB.

Measured on LeNet-5 and ResNet-20 (Fashion-MNIST, 4 bits): correct artefacts reach 38 to 53 dB and more, jitter 36 to
39 dB; a wrong weight or input scale by a tenth 16 to 25 dB, a zero-point off by four 18 to 31 dB, swapped kernel axes
below 10 dB. Agreement tells them less well: a wrong scale in the last layer changes no top-1."""


def least_snr(judge: Quantized, images: Tensor, want: Tensor) -> float:
    """The signal-to-noise ratio in dB that a correct artefact reaches against the judge's logits `want` [N, L]."""
    draw = torch.Generator().manual_seed(0)
    some = images[:JITTERED]
    with torch.no_grad():
        parts = torch.split(some, 1 if judge.single else fitting(some.shape))
        shaken = torch.cat([judge.run(x, JITTER, draw).flatten(1) for x in parts])
    return min(snr_db(want[: len(some)], shaken) - MARGIN, MOST)


def verify(
    loaded: Loaded,
    original: nn.Module,
    small: nn.Module,
    float_model: ModelProto,
    table: ScaleTable,
    models: dict[str, Path],
    talk: Talk,
) -> dict[str, Any]:
    """Accuracy of original, compressed float and each artefact on validation data, and each artefact's parity.

    Raises:
        InternalError: an artefact disagrees with the quantised torch model.
    """
    data = loaded.data
    labelled = data.classes is not None
    limit = min(len(data.val), REPORTED)
    base, labels = predict(original, data.val, limit=limit)
    floats, _ = predict(small, data.val, limit=limit)
    judged = min(limit, JUDGED)
    # The first of the images that the artefacts are run on: a smaller limit would spread over other ones.
    size = fitting(data.shape)
    images = torch.cat([x for x, _ in islice(batches(data.val, size, limit=limit), -(-judged // size))])[:judged]
    out: dict[str, Any] = {
        "images": limit,
        "original": _row(base, base, labels, labelled),
        "float": _row(floats, base, labels, labelled),
        "targets": {},
    }
    for target in loaded.targets:
        talk.say(f"  {target.name}: {limit} validation images through the artefact")
        judge = Quantized(small, float_model, table, target.flavour, data.shape)
        with torch.no_grad():
            want = torch.cat(
                [judge(x).flatten(1) for x in torch.split(images, 1 if judge.single else fitting(data.shape))]
            )
        run = target.load(models[target.name], torch.get_num_threads())
        got = torch.cat([_run(run, x.numpy()) for x, _ in batches(data.val, fitting(data.shape), limit=limit)])
        row = _row(got, base, labels, labelled)
        row["verified_agreement"] = agreement(got[:judged], want)
        row["snr_db"] = min(snr_db(want, got[:judged]), 200.0)
        row["judge_against_float_snr_db"] = min(snr_db(floats[:judged], want), 200.0)
        row["unmatched"] = judge.unmatched
        out["targets"][target.name] = row
        row["least_snr_db"] = least_snr(judge, images, want)
        if row["snr_db"] < row["least_snr_db"]:
            raise InternalError(
                f"the artefact disagrees with the quantised model: {row['verified_agreement']:.1%} of {judged} images, "
                f"{row['snr_db']:.1f} dB where {row['least_snr_db']:.1f} dB are expected",
                where=str(models[target.name]),
                fix="report this model, and use another target meanwhile",
            )
    return out


def _run(run: Any, x: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(run(x).reshape(len(x), -1)))


def _row(logits: Tensor, base: Tensor, labels: Tensor, labelled: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"agreement": agreement(logits, base), "kl": kl(base, logits)}
    if labelled:
        right, before = logits.argmax(1) == labels, base.argmax(1) == labels
        row["top1"] = topk(logits, labels)
        # Images that only one of the two gets right decide whether a drop is more than chance.
        row["lost"] = int((before & ~right).sum())
        row["won"] = int((~before & right).sum())
    return row
