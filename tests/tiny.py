"""A net and data so small that a whole `xedge compress` takes seconds.

The functions here are what a user's own file looks like: `-m tests/tiny.py:net -d tests/tiny.py:data`. Their arguments
are options of the data spec, `tests/tiny.py:data?val=noise`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from xedge.data import Data, Tensors

HERE = Path(__file__).resolve()
NET = f"{HERE}:net"
DATA = f"{HERE}:data"
CLASSES = 4
SIDE = 8


class Net(nn.Module):
    """Two convolutions and a linear layer, with a batch norm to fold."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to logits [N, classes]."""
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
        x = torch.relu(self.second(x)).mean((2, 3))
        return self.head(x)


def net(num_classes: int = CLASSES) -> Net:
    """The model's factory; its weights are drawn from torch's global generator."""
    return Net(num_classes)


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes in four directions: float32 [N, 1, 8, 8] and labels int64 [N]."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    row, column = torch.arange(SIDE).view(-1, 1), torch.arange(SIDE).view(1, -1)
    stripes = torch.stack([row + 0 * column, column + 0 * row, row + column, row - column]).float()
    phase = torch.rand(count, 1, 1, generator=draw) * 6.28
    x = torch.sin(stripes[y] * 1.6 + phase) + 1.3 * torch.randn(count, SIDE, SIDE, generator=draw)
    return x.unsqueeze(1), y


def data(val: str = "alike", labelled: str = "yes") -> Data:
    """Training data that are always the same; the option `val` changes nothing but the validation images."""
    sets = [pictures(n, seed) for n, seed in ((256, 1), (128, 2), (128, 3))]
    if val == "noise":
        sets[2] = (10 * torch.randn(96, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(4)), sets[2][1][:96])
    train, select, last = (Tensors(x, y if labelled == "yes" else None) for x, y in sets)
    classes = CLASSES if labelled == "yes" else None
    return Data(name="stripes", train=train, select=select, val=last, classes=classes, shape=(1, SIDE, SIDE))


def train(path: Path) -> Path:
    """Weights of `net` trained on `data`, in about a second."""
    torch.manual_seed(0)
    model, (x, y) = net(), pictures(256, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    save_file(model.state_dict(), path)
    return path
