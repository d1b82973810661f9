"""Is every artefact the quantised model? Each is run on validation data and compared with the torch judge."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn

from xedge.data import at_once, batches, enough
from xedge.errors import InternalError
from xedge.judge import Judge, enlarged
from xedge.metrics import agreement, snr_db
from xedge.simulate import Quantized
from xedge.train import predict

if TYPE_CHECKING:
    from xedge.candidates import Form
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


def least_snr(judge: Quantized, images: Tensor, want: Tensor, size: int) -> float:
    """The signal-to-noise ratio in dB that a correct artefact reaches against the judge's logits `want` [N, L].

    Args:
        size: images at a time.
    """
    draw = torch.Generator().manual_seed(0)
    some = images[:JITTERED]
    with torch.no_grad():
        parts = torch.split(some, 1 if judge.single else size)
        shaken = torch.cat([judge.run(x, JITTER, draw).flatten(1) for x in parts])
    return min(snr_db(want[: len(some)], shaken) - MARGIN, MOST)


def verify(
    loaded: Loaded,
    original: nn.Module,
    small: nn.Module,
    float_model: ModelProto,
    shipped: Mapping[str, Form],
    talk: Talk,
) -> dict[str, Any]:
    """Quality of original, compressed float and each artefact on validation data, and each artefact's parity.

    Args:
        shipped: target -> its artefact, with the table and the flavour that it must agree with.

    Raises:
        InternalError: an artefact disagrees with the quantised torch model.
    """
    data = loaded.data
    quality = Judge.of(data)
    limit = quality.held(min(len(data.val), REPORTED))
    base, labels = predict(original, data.val, limit=limit)
    floats, _ = predict(small, data.val, limit=limit)
    judged = min(limit, enough(data.val, JUDGED))
    # The first of the images that the artefacts are run on: a smaller limit would spread over other ones.
    size = at_once(data.val)
    images = torch.cat([x for x, _ in islice(batches(data.val, size, limit=limit), -(-judged // size))])[:judged]
    out: dict[str, Any] = {
        "images": limit,
        "original": quality.row(base, base, labels),
        "float": quality.row(floats, base, labels),
        "targets": {},
    }
    if quality.restores and data.shape[0] == quality.shape[0]:
        tiles = batches(data.val, size, limit=limit)
        plain = torch.cat([enlarged(x, y.shape[2:]).flatten(1) for x, y in tiles])
        out["plain"] = {"psnr": quality.quality(plain, labels, plain)}
    for target in loaded.targets:
        talk.say(f"  {target.name}: {limit} validation images through the artefact")
        form = shipped[target.name]
        judge = Quantized(small, float_model, form.table, form.flavour, data.shape)
        with torch.no_grad():
            want = torch.cat([judge(x).flatten(1) for x in torch.split(images, 1 if judge.single else size)])
        run = target.load(form.path, torch.get_num_threads())
        got = torch.cat([_run(run, x.numpy()) for x, _ in batches(data.val, size, limit=limit)])
        row = quality.row(got, base, labels)
        row["verified_agreement"] = None if quality.restores else agreement(got[:judged], want)
        row["snr_db"] = min(snr_db(want, got[:judged]), 200.0)
        row["judge_against_float_snr_db"] = min(snr_db(floats[:judged], want), 200.0)
        row["unmatched"] = judge.unmatched
        out["targets"][target.name] = row
        row["least_snr_db"] = least_snr(judge, images, want, size)
        if row["snr_db"] < row["least_snr_db"]:
            same = "" if quality.restores else f"{row['verified_agreement']:.1%} of {judged} images, "
            raise InternalError(
                f"the artefact disagrees with the quantised model: {same}"
                f"{row['snr_db']:.1f} dB where {row['least_snr_db']:.1f} dB are expected",
                where=str(form.path),
                fix="report this model, and use another target meanwhile",
            )
    return out


def _run(run: Any, x: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(run(x).reshape(len(x), -1)))
