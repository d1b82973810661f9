"""Small networks, one for each way in which channels hang together."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 12


def conv(inside: int, outside: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


class Plain(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(conv(width, width), nn.BatchNorm2d(width), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, 10), nn.BatchNorm2d(10), nn.ReLU(), conv(10, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Concat(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right, self.join = conv(width, 6), conv(width, 5), conv(11 + width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(x).sigmoid(), x, self.right(x)], 1))


class Chunk(nn.Module):
    """Halves that nothing but `chunk` ties."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.first, self.second = conv(width, 16), conv(8, width), conv(8, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, dim=1)
        return self.first(a) + self.second(b)


class Split(nn.Module):
    """Sizes from an attribute, which a cut must rewrite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [4, width - 4]
        self.first, self.second = conv(4, width), conv(width - 4, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, self.sizes, dim=1)
        return self.first(a) + self.second(b)


class Sliced(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.at = 5
        self.first, self.second = conv(5, width), conv(width - 5, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, : self.at]) + self.second(x[:, self.at :])


class Depthwise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(width, 2 * width, groups=width), nn.BatchNorm2d(2 * width), nn.ReLU6(), conv(2 * width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class FewGroups(nn.Module):
    """2 groups of 8: each group loses the same places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, 16, 1), conv(16, 12, groups=2), nn.BatchNorm2d(12), conv(12, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ManyGroups(nn.Module):
    """6 groups of 2: whole groups go."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, 12, 1), conv(12, 18, groups=6), nn.ReLU(), conv(18, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Shuffle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = conv(width, 16), conv(16, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        n, c, h, w = x.shape
        return self.narrow(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.twice, self.last = conv(width, 9), conv(9, 9), conv(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(F.relu(self.twice(self.first(x)))))


class SharedOnTwo(nn.Module):
    """One layer reads two tensors, which must then lose the same places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right, self.both = conv(width, 9), conv(width, 9), conv(9, 7, bias=False)
        self.last = conv(14, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.both(self.left(x)), self.both(self.right(x))], 1))


class Prelu(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(conv(width, 10), nn.PReLU(10), conv(10, width), nn.PReLU())


class PixelShuffle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, 4 * 7), nn.PixelShuffle(2), conv(7, width, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.side = conv(width, 10, stride=2), conv(width, 10)
        self.join = conv(20, width)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        size = (x.shape[2], x.shape[3])
        near = F.interpolate(low, size=size, mode="nearest")
        smooth = F.interpolate(low, size=size, mode="bilinear", align_corners=False)
        return self.join(torch.cat([near + self.side(x), smooth], 1))


class Squeeze(nn.Module):
    """Squeeze and excitation, and a spatial gate of one channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Linear(width, 5), nn.Linear(5, width), conv(width, 1)
        self.after = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return self.after(x * weights[:, :, None, None] * self.gate(x).sigmoid())


class Transposed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(width, 10, stride=2),
            nn.ConvTranspose2d(10, 12, 2, 2),
            nn.ConvTranspose2d(12, 12, 3, 1, 1, groups=12),
            nn.BatchNorm2d(12),
            nn.ConvTranspose2d(12, 8, 3, 1, 1, groups=2),
            conv(8, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.out = conv(width, width), conv(width, width)
        self.gamma = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.gamma * self.body(x))


class Norms(nn.Sequential):
    """Statistics for each channel alone: instance norm, and a group norm with one channel a group."""

    def __init__(self, width: int) -> None:
        super().__init__(
            conv(width, 10), nn.InstanceNorm2d(10, affine=True), conv(10, 8), nn.GroupNorm(8, 8), conv(8, width)
        )


class Padded(nn.Module):
    """A shortcut with zero channels on both sides; the counts are attributes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow, self.pads = conv(width, width + 4), conv(width + 4, width), [0, 0, 0, 0, 2, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.relu(self.wide(x) + F.pad(x, self.pads)))


BLOCKS: tuple[Callable[[int], nn.Module], ...] = (
    Plain, Residual, Concat, Chunk, Split, Sliced, Depthwise, FewGroups, ManyGroups, Shuffle, Shared, SharedOnTwo,
    Prelu, PixelShuffle, Upsample, Squeeze, Transposed, LayerScale, Norms, Padded,
)  # fmt: skip


class Net(nn.Module):
    """A stem, blocks, and a head that either flattens (each channel feeds 16 positions) or pools."""

    def __init__(self, blocks: list[Callable[[int], nn.Module]], flatten: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.blocks = nn.Sequential(*[block(WIDTH) for block in blocks])
        self.pool: nn.Module = nn.MaxPool2d(2) if flatten else nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTH * 16 if flatten else WIDTH, 11)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.head(F.hardswish(self.fc(x.flatten(1))))


EXAMPLE = (1, 3, 8, 8)


def single(block: Callable[[int], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net([block], flatten=True).eval()


def drawn(seed: int) -> Net:
    choice = random.Random(seed)
    torch.manual_seed(seed)
    return Net(choice.choices(BLOCKS, k=3), flatten=choice.random() < 0.5).eval()
