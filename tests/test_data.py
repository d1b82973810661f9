"""xedge.data: splits, permutations, batches, normalisation, the check of a user's own data, options, fetch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import everything
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from xedge.data import UNLABELLED, Data, Options, Tensors, batches, check, fetch, loader, permutation, split
from xedge.errors import UsageError


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    fraction=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**40),
    cover=st.booleans(),
)
def test_a_split_is_a_stratified_partition(labels: list[int], fraction: float, seed: int, cover: bool) -> None:
    y = torch.tensor(labels)
    count = round(fraction * len(labels))
    rest, part = split(y, count, seed, "test", cover=cover)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(len(labels)))
    again = split(y, count, seed, "test", cover=cover)
    assert torch.equal(part, again[1])
    if not cover:
        assert len(part) == count
    for value, size in zip(*torch.unique(y, return_counts=True), strict=True):
        taken = int((y[part] == value).sum())
        share = count * int(size) / len(labels)
        if cover and size >= 2:
            assert 1 <= taken <= int(size) - 1
        if cover and size == 1:
            assert taken == 0
        if not cover:
            assert share - 1 < taken < share + 1


def test_permutations_are_frozen_and_independent_of_each_other() -> None:
    # Written down: a change of numpy, torch or xedge that moved them would move every split that users have.
    assert permutation(8, 0, "loader").tolist() == FROZEN
    first = permutation(1000, 0, "loader", 0)
    for other in ((1, "loader", 0), (0, "select", 0), (0, "loader", 1)):
        fixed = int((permutation(1000, *other) == first).sum())
        assert fixed < 10
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert len(permutation(3, -5, "a negative seed")) == 3


FROZEN = [2, 3, 4, 6, 1, 7, 5, 0]


def numbered(n: int) -> Tensors:
    return Tensors(
        torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous(), torch.arange(n)
    )


@pytest.mark.parametrize("n", [1, 7, 8, 9, 33])
def test_an_epoch_shows_every_image_once_with_its_label(n: int) -> None:
    data = numbered(n)
    seen = torch.cat([y for _, y in loader(data, 8, seed=3, epoch=1)])
    expected = n - 1 if n > 1 and n % 8 == 1 else n  # batch norm cannot train on one image
    assert len(seen) == len(seen.unique()) == expected
    for x, y in loader(data, 8, seed=3, epoch=1):
        assert torch.equal(x[:, 0, 0, 0].long(), y)
    ordered = torch.cat([y for _, y in batches(data, 8)])
    assert torch.equal(ordered, torch.arange(n))
    shuffled = torch.cat([y for _, y in batches(data, 8, shuffle_seed=5)])
    assert torch.equal(shuffled.sort().values, ordered)


def test_epochs_differ_repeat_and_leave_the_global_random_state_alone() -> None:
    data = numbered(64)
    before = torch.get_rng_state()

    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([y for _, y in loader(data, 8, seed, epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1, 2)}) == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_a_limit_without_shuffle_is_spread_over_the_whole_set() -> None:
    seen = torch.cat([y for _, y in batches(numbered(100), 3, limit=10)])
    assert seen.tolist() == list(range(0, 100, 10))
    assert sum(len(y) for _, y in batches(numbered(5), 3, limit=10)) == 5
    assert sum(len(y) for _, y in batches(numbered(50), 3, limit=7, shuffle_seed=0)) == 7


def test_a_plain_torch_dataset_gives_the_same_batches_as_the_fast_one() -> None:
    x, y = torch.randn(20, 3, 4, 4), torch.arange(20)
    fast = Tensors(x, y)
    slow = Subset(TensorDataset(x, y), range(20))
    for a, b in zip(loader(fast, 6, 1, 2), loader(slow, 6, 1, 2), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    # and torch's own loader with its default collation takes the fast one
    for (a, b), (c, d) in zip(DataLoader(fast, batch_size=6), batches(fast, 6), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_normalisation_is_torchvisions() -> None:
    from torchvision.transforms import v2

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    x = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(x))
    torch.testing.assert_close(everything(Tensors(x, mean=mean, std=std))[0], theirs)
    plain = torch.randn(5, 3, 6, 6)
    ours = everything(Tensors(plain))[0]
    assert torch.equal(ours, plain)
    ours.zero_()
    assert bool(plain.any())  # a batch is a copy: changing it does not change the data
    sub = Tensors(x).subset(torch.tensor([4, 2, 0])).subset(torch.tensor([2, 0]))
    torch.testing.assert_close(everything(sub)[0], x[[0, 4]].float() / 255)
    assert everything(sub)[1].tolist() == [UNLABELLED] * 2


def make(x: Tensor, y: Tensor | None, **other: object) -> Data:
    fields: dict[str, object] = {"name": "mine", "classes": 3, "shape": (1, 2, 2)}
    sets = Tensors(x, y)
    return Data(**{**fields, "train": sets, "select": sets, "val": sets, **other})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 2, 2)}, "Data.shape is"),
        ({"x": torch.full((4, 1, 2, 2), torch.nan)}, "NaN"),
        ({"y": torch.full((4,), 3)}, "label is 3, not 0..2"),
        ({"y": None}, "label is -1, not 0..2"),
        ({"classes": None}, "though classes is None"),
        ({"x": torch.zeros(0, 1, 2, 2), "y": torch.zeros(0)}, "split is empty"),
        ({"class_names": ("a",)}, "1 class names for 3"),
    ],
)
def test_data_of_a_users_own_is_checked(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x": torch.zeros(4, 1, 2, 2), "y": torch.tensor([0, 1, 2, 0]), **change}
    with pytest.raises(UsageError, match=message):
        check(make(**arguments))  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match=r"unknown option 'sise'; did you mean size"):
        Options.of("folder:x", {"sise": "3"}, ("size", "limit"))
    opts = Options.of(
        "d", {"n": "3", "bad": "x", "f": "1.5", "m": "1,2,3", "one": "0.5"}, ("n", "bad", "f", "m", "one")
    )
    assert opts.integer("n") == 3
    assert opts.integer("absent") is None
    assert opts.numbers("m", count=3) == (1.0, 2.0, 3.0)
    assert opts.numbers("one", count=2) == (0.5, 0.5)
    for wrong in (
        lambda: opts.integer("bad"),
        lambda: opts.integer("n", low=4),
        lambda: opts.fraction("f", 0.1),
        lambda: opts.fraction("bad", 0.1),
        lambda: opts.numbers("m", count=2),
        lambda: opts.numbers("bad", count=1),
        lambda: opts.choice("bad", "a", ("a", "b")),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_fetch_takes_the_first_mirror_that_has_the_right_file(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"right")
    (tmp_path / "bad").write_bytes(b"wrong")
    urls = [(tmp_path / name).as_uri() for name in ("absent", "bad", "good")]
    md5 = hashlib.md5(b"right", usedforsecurity=False).hexdigest()
    to = tmp_path / "new" / "file"
    assert fetch(urls, to, md5=md5, fix="").read_bytes() == b"right"
    assert list(to.parent.iterdir()) == [to]
    with pytest.raises(UsageError, match="sent another file"):
        fetch(urls[:2], tmp_path / "other", md5=md5, fix="")
    assert not (tmp_path / "other").exists()
