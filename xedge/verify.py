"""Is every artefact the quantised model? Each is run on validation data and compared with the torch judge."""

from __future__ import annotations

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
    from xedge.pipeline import Loaded
    from xedge.progress import Talk

JUDGED = 512
"""Validation images on which artefact and judge are compared."""
REPORTED = 10_000
"""Validation images at most on which an artefact's accuracy is taken."""
LEAST_AGREEMENT = 0.97
LEAST_SNR = 12.0
"""Integer kernels round ties and sums in another order than float arithmetic, and deep nets amplify that; a wrong
scale, layout or operator lies far below both limits."""


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
    images = torch.cat([x for x, _ in batches(data.val, fitting(data.shape), limit=judged)])
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
        # Noise from rounding in another order cannot be larger than the quantisation noise itself by much.
        least = min(LEAST_SNR, row["judge_against_float_snr_db"] - 3)
        if row["verified_agreement"] < LEAST_AGREEMENT and row["snr_db"] < least:
            raise InternalError(
                f"the artefact disagrees with the quantised model: {row['verified_agreement']:.1%} of {judged} images, "
                f"{row['snr_db']:.1f} dB",
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
