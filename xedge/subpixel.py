"""Sub-pixel convolutions rewritten as nearest-neighbour enlargement and a convolution.

A convolution C -> D r^2 with a pixel shuffle by r gives each of the r x r pixels on an input pixel a 3x3 kernel of its
own, K_p over the inputs around. Behind a nearest-neighbour enlargement a k x k kernel V meets the same inputs, each
several times: for the pixel at phase p it acts as S_p V, where S_p adds up the weights that fall on one input. So

- a sub-pixel convolution is exactly a transposed convolution of 3r x 3r with stride r, whose weights are the K_p
  interleaved;
- it is exactly nearest neighbours and a convolution if and only if that kernel is divisible by the r x r box, which
  means that along each axis the K_p of all phases have equal sums: no checkerboard. Then V has 2r + 1 taps a side;
- any other has a nearest V. Least squares on the layer's own inputs z (3x3 patches and a constant, Gram matrix G):
  (sum_p S_p' G S_p) V = sum_p S_p' G K_p.

A 3x3 V, which takes as many multiply-adds as the sub-pixel form and 1 / r^2 of its parameters, has too few taps to be
exact for most layers: what is left is measured, and a short training takes it up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xedge.errors import UsageError


@dataclass(frozen=True)
class Subpixel:
    """A convolution whose output a pixel shuffle lays out, and nothing else reads.

    Attributes:
        conv, shuffle: names of the modules.
        factor: r.
    """

    conv: str
    shuffle: str
    factor: int


def find_subpixels(model: nn.Module, example: Tensor) -> tuple[Subpixel, ...]:
    """The sub-pixel convolutions that one forward pass meets: stride 1, 1x1 or 3x3 with padding that keeps the size."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: list[Subpixel] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and _plain(module):

            def keep(_m: nn.Module, _x: object, out: Tensor, name: str = name) -> None:
                made[id(out)] = (name, out)  # the tensor too, or its id would be given to another

            handles.append(module.register_forward_hook(keep))
        elif isinstance(module, nn.PixelShuffle):

            def match(m: nn.Module, x: tuple[Tensor, ...], name: str = name) -> None:
                if id(x[0]) in made:
                    assert isinstance(m, nn.PixelShuffle)
                    found.append(Subpixel(made[id(x[0])][0], name, m.upscale_factor))

            handles.append(module.register_forward_pre_hook(match))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _plain(conv: nn.Conv2d) -> bool:
    square = conv.kernel_size in ((1, 1), (3, 3)) and conv.padding == (conv.kernel_size[0] // 2,) * 2
    return square and conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"


def rewritten(model: nn.Module, pairs: Iterable[Subpixel], kernel: int = 3) -> nn.Module:
    """A copy of `model` with each pair as nearest neighbours and a `kernel` x `kernel` convolution, freshly drawn.

    The structure depends on the arguments alone, so that weights saved from one such copy load into another.

    Raises:
        UsageError: the kernel is even, or reaches beyond the inputs that a sub-pixel convolution sees.
    """
    new = copy.deepcopy(model)
    for pair in pairs:
        if kernel % 2 == 0 or kernel > 2 * pair.factor + 1:
            raise UsageError(f"a kernel of {kernel} for a factor of {pair.factor}", fix="use 3, or at most 2 r + 1")
        conv = new.get_submodule(pair.conv)
        assert isinstance(conv, nn.Conv2d)
        flat = nn.Conv2d(
            conv.in_channels,
            conv.out_channels // pair.factor**2,
            kernel,
            padding=kernel // 2,
            bias=conv.bias is not None,
        )
        _put(new, pair.conv, nn.Sequential(nn.Upsample(scale_factor=pair.factor, mode="nearest"), flat))
        _put(new, pair.shuffle, nn.Identity())
    return new.train(model.training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent).register_module(own, module)


def rewrite_subpixels(
    model: nn.Module, inputs: Iterable[Tensor], kernel: int = 3
) -> tuple[nn.Module, dict[Subpixel, float]]:
    """`rewritten`, its convolutions fitted to what the sub-pixel ones gave.

    Args:
        model: it is not changed.
        inputs: batches of its inputs, [N, C, H, W].
        kernel: side of the new convolutions.

    Returns:
        the new model, in eval mode, and for each pair the error that is left: RMS over the layer's output, as a part of
        that output's standard deviation. Below 1e-5 the rewrite is exact but for rounding.

    Raises:
        UsageError: the model has no sub-pixel convolution made of modules, or no inputs were given.
    """
    model = copy.deepcopy(model).eval()
    batches = list(inputs)
    if not batches:
        raise UsageError("no inputs were given to fit the new convolutions to", where="--rewrite-subpixel")
    pairs = find_subpixels(model, batches[0][:1])
    if not pairs:
        raise UsageError("has no convolution with a pixel shuffle behind it", where=type(model).__name__)
    new = rewritten(model, pairs, kernel).eval()
    errors = {}
    for pair, gram in _grams(model, pairs, batches).items():
        conv, flat = model.get_submodule(pair.conv), new.get_submodule(f"{pair.conv}.1")
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(flat, nn.Conv2d)
        errors[pair] = _fit(conv, flat, pair.factor, gram)
    return new, errors


def _grams(model: nn.Module, pairs: Iterable[Subpixel], batches: Iterable[Tensor]) -> dict[Subpixel, Tensor]:
    """Mean of z z' [9C + 1, 9C + 1] in float64 over each convolution's own inputs: 3x3 patches and a one."""
    sums: dict[Subpixel, Tensor] = {}
    counts = dict.fromkeys(pairs, 0)

    def hook(pair: Subpixel) -> object:
        def add(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = functional.unfold(args[0], 3, padding=1).movedim(1, 2).flatten(0, 1)
            z = torch.cat([z, torch.ones(len(z), 1)], 1)
            gram = (z.T @ z).double()
            sums[pair] = gram if pair not in sums else sums[pair] + gram
            counts[pair] += len(z)

        return add

    handles = [model.get_submodule(pair.conv).register_forward_pre_hook(hook(pair)) for pair in pairs]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {pair: total / counts[pair] for pair, total in sums.items()}


def _fit(conv: nn.Conv2d, flat: nn.Conv2d, factor: int, gram: Tensor) -> float:
    """Set `flat` to the least-squares V; returns the error that is left."""
    inside, outside, kernel = flat.in_channels, flat.out_channels, flat.kernel_size[0]
    weight = conv.weight.detach().double()
    if weight.shape[2] == 1:
        weight = functional.pad(weight, (1, 1, 1, 1))
    own = torch.zeros(len(weight), dtype=torch.float64) if conv.bias is None else conv.bias.detach().double()
    # K[phase]: [9C + 1, D], rows as unfold orders them (channel, then place)
    wanted = torch.cat([weight.flatten(1), own[:, None]], 1).view(outside, factor**2, -1).permute(1, 2, 0)
    constant = conv.bias is not None
    size = inside * kernel**2 + constant
    left, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, outside, dtype=torch.float64)
    spreads = []
    for phase in range(factor**2):
        spread = _spread(phase, factor, kernel, inside, constant)
        spreads.append(spread)
        left += spread.T @ gram @ spread
        right += spread.T @ gram @ wanted[phase]
    ridge = 1e-10 * left.diagonal().mean()
    solved = torch.linalg.solve(left + ridge * torch.eye(size, dtype=torch.float64), right)
    with torch.no_grad():
        flat.weight.copy_(solved[: inside * kernel**2].T.view(outside, inside, kernel, kernel))
        if flat.bias is not None:
            flat.bias.copy_(solved[-1])
    rest = variance = 0.0
    mean = sum(gram[-1] @ wanted[phase] for phase in range(factor**2)) / factor**2
    for phase, spread in enumerate(spreads):
        off = wanted[phase] - spread @ solved
        rest += float(((gram @ off) * off).sum())
        about = wanted[phase].clone()
        about[-1] -= mean
        variance += float(((gram @ about) * about).sum())
    return float((max(rest, 0.0) / max(variance, 1e-30)) ** 0.5)


def _spread(phase: int, factor: int, kernel: int, inside: int, constant: bool) -> Tensor:
    """S_p [9C + 1, C k^2 (+ 1)]: which input each weight of V falls on at a phase."""
    along = torch.zeros(2, 3, kernel, dtype=torch.float64)
    for axis, offset in enumerate(divmod(phase, factor)):
        for tap in range(kernel):
            along[axis, (offset + tap - kernel // 2) // factor + 1, tap] = 1
    places = torch.kron(along[0], along[1])  # [9, k^2]
    square = torch.kron(torch.eye(inside, dtype=torch.float64), places)
    spread = torch.zeros(9 * inside + 1, square.shape[1] + constant, dtype=torch.float64)
    spread[:-1, : square.shape[1]] = square
    if constant:
        spread[-1, -1] = 1
    return spread
