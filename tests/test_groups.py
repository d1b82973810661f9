"""Channel groups: what hangs together, what is frozen and why, and that each rule of the labels is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import graphs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xedge.channels import Groups, Keep
from xedge.errors import UnsupportedGraph, UsageError
from xedge.groups import analyse, find_groups
from xedge.labels import Act, Labelling, Labels, Par, modules_of
from xedge.mixes import Mixes
from xedge.moves import Moves
from xedge.prune import certificate, cut

EXAMPLE = torch.zeros(graphs.EXAMPLE)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some(groups: Groups, seed: int = 0) -> Keep:
    """Any number of any channels of each group, but neither none nor all."""
    generator = np.random.default_rng(seed)
    keep = groups.whole()
    for group in groups.free:
        keep[group.name][generator.permutation(group.size)[: generator.integers(1, group.size)]] = False
    return keep


@contextmanager
def silenced(model: nn.Module, groups: Groups, keep: Keep) -> Iterator[None]:
    """A second reference: dropped channels of each consumer's INPUT TENSOR are zero, by the slices' `inputs`."""
    modules = dict(model.named_modules())
    gone: dict[str, list[int]] = {}
    for group in groups.groups:
        for piece in group.slices:
            if piece.kind == "in":
                gone.setdefault(piece.layer, []).extend(piece.inputs[~keep[group.name]].ravel().tolist())

    def hook(places: list[int]) -> Callable[[nn.Module, Any], Any]:
        def zero(module: nn.Module, args: Any) -> Any:
            x = args[0].clone()
            x[(..., places) if isinstance(module, nn.Linear) else (slice(None), places)] = 0
            return (x,)

        return zero

    handles = [modules[name].register_forward_pre_hook(hook(places)) for name, places in gone.items() if places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("block", graphs.BLOCKS, ids=lambda block: block.__name__)
def test_each_way_of_hanging_together_is_cut_exactly(block: Callable[[int], nn.Module]) -> None:
    model = graphs.single(block)
    groups = find_groups(model, EXAMPLE)
    assert all(group.frozen is None for group in groups.groups)
    assert len(groups.groups) >= 2
    assert {layer for layer, _ in groups.frozen} <= {"head", "blocks.0.gate"}
    keep = some(groups)
    proof = certificate(model, groups, keep, EXAMPLE)
    assert proof.ok, proof
    assert proof.max_error <= 1e-9 < proof.moved
    torch.manual_seed(1)
    x, double = torch.randn(3, *graphs.EXAMPLE[1:], dtype=torch.float64), graphs.single(block).double()
    small = cut(double, groups, keep)
    with silenced(double, groups, keep):
        want = double(x)
    torch.testing.assert_close(small(x), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs(seed: int) -> None:
    model = graphs.drawn(seed)
    groups = find_groups(model, EXAMPLE)
    assert len(groups.free) >= 2
    proof = certificate(model, groups, some(groups, seed), EXAMPLE)
    assert proof.ok, proof


@pytest.mark.parametrize("seed", range(2))
def test_slices_tile_their_axes(seed: int) -> None:
    """No position is in two groups, every index is in range, and all of one parameter's sizes agree."""
    model = graphs.drawn(100 + seed)
    tensors = model.state_dict()
    seen: dict[tuple[str, int], list[int]] = {}
    for group in find_groups(model, EXAMPLE).groups:
        for piece in group.slices:
            assert len(piece.index) == len(piece.inputs) == group.size
            assert piece.size == tensors[piece.param].shape[piece.axis]
            assert (piece.inputs.shape[1] > 0) == (piece.kind == "in")
            assert piece.param.startswith(piece.layer)
            seen.setdefault((piece.param, piece.axis), []).extend(piece.index.ravel().tolist())
    for (param, axis), places in seen.items():
        assert len(places) == len(set(places))
        assert max(places) < tensors[param].shape[axis]


def test_roles() -> None:
    groups = find_groups(graphs.single(graphs.Depthwise), EXAMPLE)
    stem = groups["stem.0"]
    assert stem.producers == ("stem.0",)
    assert set(stem.followers) == {"stem.1", "blocks.0.body.0", "blocks.0.body.1"}
    assert stem.consumers == ("blocks.0.body.3",)
    flat = groups["blocks.0.body.3"]
    (piece,) = (piece for piece in flat.slices if piece.layer == "fc")
    np.testing.assert_array_equal(piece.index, np.arange(12 * 16).reshape(12, 16))


def test_inputs_of_a_grouped_consumer_are_positions_in_its_input() -> None:
    groups = find_groups(graphs.single(graphs.FewGroups), EXAMPLE)
    (piece,) = (p for p in groups["blocks.0.body.0"].slices if p.kind == "in")
    np.testing.assert_array_equal(piece.index, np.arange(8)[:, None])
    np.testing.assert_array_equal(piece.inputs, np.stack([np.arange(8), np.arange(8) + 8], 1))


# ---- frozen, with reasons ----


class LayerNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.o(weights @ self.v(x))


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight - self.a.weight.mean((1, 2, 3), keepdim=True)
        return self.b(F.conv2d(x, weight, self.a.bias))


class Neighbours(nn.Module):
    """Efficient channel attention: a convolution slides over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.eca, self.b = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.eca(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.b(x * gate.transpose(1, 2).unsqueeze(-1))


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cdist(self.a(x), self.a(x)))


class Hidden(nn.Module):
    """The number that a cut must rewrite is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(5, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)[:, :5]))


class Exposed(nn.Module):
    """Channels that a layer reads and that are the model's output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return torch.cat([x, self.c(self.b(x))], 1)


def normed(groups: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(groups, 8), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    ("make", "layers", "reason", "free"),
    [
        (LayerNormed, {"a"}, "layer norm over channels", {"b"}),
        (lambda: normed(2), {"0"}, "group norm over channels", set()),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 1)), {"0"}, "avg_pool3d",
         set()),
        (Attention, {"q", "k"}, "attention product", {"v"}),
        (Fused, {"q", "k", "v"}, "attention product", set()),
        (Standardised, {""}, "computed in forward", set()),
        (Neighbours, {"a"}, "convolution across channels at eca", set()),
        (Exposed, {"a"}, "model output", {"b"}),
        (Strange, {"a"}, "cdist.default is not followed", set()),
        (Hidden, {"a"}, "the cut model does not run", {"b"}),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_frozen_with_its_reason(
    make: Callable[[], nn.Module], layers: set[str], reason: str, free: set[str]
) -> None:
    torch.manual_seed(0)
    groups = find_groups(make(), EXAMPLE)
    told = dict(groups.frozen)
    assert layers <= set(told)
    assert all(reason in why for layer, why in told.items() if layer in layers), told
    assert {group.name for group in groups.free} == free


def test_the_models_input_and_output_stay() -> None:
    groups = find_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), EXAMPLE)
    assert [group.name for group in groups.groups] == ["0"]
    assert groups.frozen == (("1", "model output"),)
    assert all((piece.param, piece.axis) != ("0.weight", 1) for piece in groups["0"].slices)


def test_excluded_layers_stay() -> None:
    model = graphs.single(graphs.Residual)
    free = {group.name for group in find_groups(model, EXAMPLE, exclude=r"^stem\.0$").free}
    assert free == {"blocks.0.body.0", "fc"}
    assert ("stem.0", "excluded by '^stem\\\\.0$'") in find_groups(model, EXAMPLE, exclude=r"^stem\.0$").frozen
    with pytest.raises(UsageError, match="not a regular expression"):
        find_groups(model, EXAMPLE, exclude="(")


def test_a_graph_that_cannot_be_traced_is_one_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedGraph) as caught:
        find_groups(Branches(), EXAMPLE)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert "Branches" in str(caught.value)


def test_the_model_is_left_as_it_was() -> None:
    model = graphs.drawn(3)
    model.train()
    model.blocks[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    find_groups(model, EXAMPLE)
    assert flags == [module.training for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_groups_survive_json() -> None:
    groups = find_groups(graphs.single(graphs.Split), EXAMPLE)
    text = json.dumps(groups.to_json())
    again = Groups.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    keep = some(groups)
    assert certificate(graphs.single(graphs.Split), again, keep, EXAMPLE).ok


def test_unknown_group_suggests_the_nearest() -> None:
    groups = find_groups(graphs.single(graphs.Plain), EXAMPLE)
    with pytest.raises(UsageError, match=r"did you mean stem\.0"):
        _ = groups["stem"]


# ---- every rule is needed: without it a certificate fails ----


def _nothing(*_: object, **__: object) -> None:
    return None


def _untied(_: Labelling, core: Tensor) -> Tensor:
    return core


def _meet_once(self: Labelling, par: Par, dim: int, labels: Any, kind: str) -> None:
    self.axes.setdefault((par.name, dim), labels)
    self.kinds.setdefault((par.name, dim), kind)


def _one_by_one(self: Labelling, par: Par, dim: int, kind: str = "pass") -> Any:
    """Fresh labels at every call: a layer called twice makes two unrelated sets of channels."""
    labels = self.labels.fresh(par.shape[dim])
    self.axes.setdefault((par.name, dim), labels)
    self.kinds.setdefault((par.name, dim), kind)
    return labels


def _layer_norm_passes(self: Mixes, node: Any, bound: dict[str, Any]) -> Act:
    return self._act(bound["input"])


RULES: tuple[tuple[type, str, Callable[..., Any], Callable[[], nn.Module]], ...] = (
    (Moves, "_unite_elements", _nothing, lambda: graphs.single(graphs.Residual)),
    (Moves, "_unite_elements", _nothing, lambda: graphs.single(graphs.LayerScale)),
    (Moves, "_unite_chunks", _nothing, lambda: graphs.single(graphs.Chunk)),
    (Labelling, "_tie_box", _untied, lambda: graphs.single(graphs.Shuffle)),
    (Labelling, "_meet", _meet_once, lambda: graphs.single(graphs.SharedOnTwo)),
    (Labelling, "axis", _one_by_one, lambda: graphs.single(graphs.SharedOnTwo)),
    (Labelling, "_width", _nothing, lambda: graphs.single(graphs.Depthwise)),
    (Mixes, "_tie_blocks", _nothing, lambda: graphs.single(graphs.ManyGroups)),
    (Mixes, "_tie_rows", _nothing, lambda: graphs.single(graphs.FewGroups)),
    (Mixes, "_follow", _nothing, lambda: graphs.single(graphs.Plain)),
    (Mixes, "_follow", _nothing, lambda: graphs.single(graphs.Prelu)),
    (Mixes, "_bias", _nothing, lambda: graphs.single(graphs.Plain)),
    (Mixes, "_op_layer_norm", _layer_norm_passes, LayerNormed),
    (Labels, "freeze", _nothing, Exposed),
)


@pytest.mark.parametrize(
    ("owner", "name", "without", "make"), RULES, ids=[str(rule[1]) + str(i) for i, rule in enumerate(RULES)]
)
def test_without_any_one_rule_the_certificate_fails(
    owner: type, name: str, without: Callable[..., Any], make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make()

    def proved() -> bool:
        groups, _ = analyse(model, EXAMPLE)
        return certificate(model, groups, some(groups), EXAMPLE).ok

    assert proved()
    monkeypatch.setattr(owner, name, without)
    assert not proved()


def test_modules_of_a_node_are_innermost_first() -> None:
    program = torch.export.export(graphs.single(graphs.Shared), (EXAMPLE,), strict=False)
    stacks = [modules_of(node) for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert stacks[0][0] == "stem.0"
    assert [stack[0] for stack in stacks].count("blocks.0.twice") == 2
