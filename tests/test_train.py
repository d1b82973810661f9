"""Training: interrupted after any epoch it goes on to the same bits; what it refuses; batch norm's statistics."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xedge.data import Data, Tensors
from xedge.errors import InternalError, UsageError
from xedge.train import Recipe, fit, predict

RECIPE = Recipe(epochs=3, lr=0.02, batch=48, seed=5)


def noisy(x: Tensor, draw: torch.Generator) -> Tensor:
    """An augmentation that draws numbers."""
    return x + 0.1 * torch.randn(x.shape, generator=draw)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The batches are so small that a second thread would only wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    return dataclasses.replace(tiny.data(), augment=noisy)


class Dropping(tiny.Net):
    """Draws from torch's global generator as it trains."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


def fresh() -> nn.Module:
    torch.manual_seed(11)
    return Dropping()


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Stop(BaseException):
    """Stands for SIGKILL."""


def stopping(data: Data, after: int) -> Data:
    """The same data, whose augmentation is killed at its `after`-th batch."""
    left = [after]

    def augment(x: Tensor, draw: torch.Generator) -> Tensor:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        return noisy(x, draw)

    return dataclasses.replace(data, augment=augment)


@pytest.mark.parametrize("killed_at", [1, 6, 13])
def test_interrupted_and_continued_gives_the_same_bits(data: Data, tmp_path: Path, killed_at: int) -> None:
    """Six batches an epoch: killed in the first, at boundaries, and within the later ones."""
    whole = fit(fresh(), data, RECIPE)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stop):
        fit(fresh(), stopping(data, killed_at), RECIPE, checkpoint=checkpoint)
    assert checkpoint.exists() == (killed_at >= 6)
    torch.manual_seed(99)  # whatever the new process draws before
    np.random.default_rng()
    model = Dropping()
    model = fit(fresh() if killed_at < 6 else model, data, RECIPE, checkpoint=checkpoint)
    assert equal(model, whole)
    assert not model.training


def test_a_finished_checkpoint_trains_no_more(data: Data, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    whole = fit(fresh(), data, RECIPE, checkpoint=checkpoint)
    assert equal(fit(Dropping(), stopping(data, 0), RECIPE, checkpoint=checkpoint), whole)


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"seed": 6}, {"distill": 0.5}])
def test_a_checkpoint_of_another_recipe_is_not_used(data: Data, tmp_path: Path, change: dict[str, float]) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(fresh(), data, dataclasses.replace(RECIPE, epochs=1), checkpoint=checkpoint)
    other = dataclasses.replace(RECIPE, **{"epochs": 2, **change})
    teacher = fresh()
    assert equal(
        fit(fresh(), data, other, checkpoint=checkpoint, original=teacher), fit(fresh(), data, other, original=teacher)
    )


@pytest.mark.parametrize("spoil", ["other model", "cut short", "empty", "not one"])
def test_a_foreign_or_damaged_checkpoint_is_not_used(data: Data, tmp_path: Path, spoil: str) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    recipe = dataclasses.replace(RECIPE, epochs=1)
    fit(fresh() if spoil != "other model" else tiny.Net(5), data, recipe, checkpoint=checkpoint)
    if spoil == "cut short":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    elif spoil == "empty":
        checkpoint.write_bytes(b"")
    elif spoil == "not one":
        checkpoint.write_bytes(b"x" * 1000)
    assert equal(fit(fresh(), data, recipe, checkpoint=checkpoint), fit(fresh(), data, recipe))


def test_global_generators_decide_nothing(data: Data) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1)
    one = fit(fresh(), data, recipe)
    model = fresh()
    torch.manual_seed(77)
    assert equal(fit(model, data, recipe), one)
    assert not equal(fit(fresh(), data, dataclasses.replace(recipe, seed=6)), one)


@pytest.mark.parametrize("number", [-1, 2**32, 2**40])
def test_any_seed_trains(data: Data, number: int) -> None:
    fit(fresh(), data, dataclasses.replace(RECIPE, epochs=1, seed=number))


def test_training_learns(data: Data) -> None:
    logits, labels = predict(fit(fresh(), data, dataclasses.replace(RECIPE, epochs=10, lr=0.1)), data.select)
    assert float((logits.argmax(1) == labels).float().mean()) > 0.6  # chance is 0.25


def test_without_labels_the_original_teaches() -> None:
    plain, original = tiny.data(labelled="no"), fit(fresh(), tiny.data(), RECIPE)
    with pytest.raises(InternalError, match="teacher"):
        fit(fresh(), plain, RECIPE)
    before = copy.deepcopy(original)
    student = fit(fresh(), plain, dataclasses.replace(RECIPE, distill=1.0), original=original)
    assert equal(original, before), "the teacher changed"
    (a, _), (b, _) = predict(student, plain.select), predict(original, plain.select)
    assert float((a.argmax(1) == b.argmax(1)).float().mean()) > 0.7


def test_frozen_norms_keep_their_statistics_and_train_the_rest(data: Data) -> None:
    before, free = fresh(), fit(fresh(), data, RECIPE)
    frozen = fit(fresh(), data, dataclasses.replace(RECIPE, frozen_norms=True))
    statistics = [k for k in before.state_dict() if "running_" in k]
    assert statistics
    for k, v in before.state_dict().items():
        kept = k in statistics or k.endswith("num_batches_tracked")
        assert torch.equal(frozen.state_dict()[k], v) == kept
        assert not torch.equal(free.state_dict()[k], v)


def test_a_loss_that_is_not_finite_is_one_line(data: Data) -> None:
    model = fresh()
    with torch.no_grad():
        model.get_parameter("head.bias")[0] = float("nan")
    with pytest.raises(UsageError, match="no longer finite"):
        fit(model, data, RECIPE)


def test_zero_epochs_train_nothing(data: Data) -> None:
    model = fresh().train()
    assert fit(model, data, dataclasses.replace(RECIPE, epochs=0)) is model
    assert equal(model, fresh())
    assert not model.training


@pytest.mark.parametrize("count", [2, 49, 97])
def test_a_last_batch_of_one_image_does_no_harm(data: Data, count: int) -> None:
    x, y = tiny.pictures(count, 1)
    fit(fresh(), dataclasses.replace(data, train=Tensors(x, y)), dataclasses.replace(RECIPE, epochs=1))


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 300)))
@settings(max_examples=25)
def test_predictions_come_in_the_order_of_the_data(count: int, limit: int | None) -> None:
    x, _ = tiny.pictures(count, 9)
    model = nn.Sequential(nn.Flatten())
    logits, labels = predict(model, Tensors(x, torch.arange(count)), limit=limit)
    n = count if limit is None else min(count, limit)
    assert logits.shape == (n, 64)
    assert torch.equal(logits, x.flatten(1)[labels])
    assert labels.tolist() == sorted(set(labels.tolist()))
