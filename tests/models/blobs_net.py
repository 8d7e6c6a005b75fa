"""A stranger's segmenter: two inputs, two outputs, a gate, a transposed convolution and a head of one value.
`make` trains, as a user's function may.
"""

from __future__ import annotations

import torch
from blobs_shapes import SIDE, pictures
from torch import Tensor, nn


class Blobs(nn.Module):
    """The mask of a bright blob, and the share of the picture that it covers."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner, self.gate = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(8, 16, 1)
        self.up, self.mask = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 1, 1)
        self.tokens, self.share = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, picture: Tensor, level: Tensor) -> dict[str, Tensor]:
        """`level` [batch] is the brightness of the ground."""
        x = self.down(picture - level[:, None, None, None])
        x = self.inner(x) * torch.sigmoid(self.gate(x))
        pooled = torch.relu(self.tokens(x.mean((2, 3))))
        return {"mask": self.mask(torch.relu(self.up(x))), "share": self.share(pooled).squeeze(-1)}


def loss(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    mask = nn.functional.binary_cross_entropy_with_logits(outputs["mask"], batch["truth"])
    return mask + (outputs["share"] - batch["truth"].mean((1, 2, 3))).square().mean()


def make() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Blobs()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(20):
        picture, level, truth = pictures(16, step)
        optimizer.zero_grad()
        loss(net(picture, level), {"truth": truth}).backward()
        optimizer.step()
    picture, level, _ = pictures(2, 999)
    return net.eval(), {"picture": picture, "level": level}


class Plain(nn.Module):
    """One linear layer, whose output is made into another one."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.layer, self.output = nn.Linear(SIDE, SIDE), output

    def forward(self, x: Tensor) -> object:
        return self.output(self.layer(x.float()))


def pair() -> object:
    """A tuple with a nested one and None."""
    return Plain(lambda y: (y, (y[:, :2], None))), torch.ones(3, SIDE)


def without_batch() -> object:
    return Plain(lambda y: y.mean(0)), torch.ones(2, SIDE)


def scalar() -> object:
    return Plain(lambda y: y.mean()), torch.ones(2, SIDE)


def of_half_inputs() -> object:
    return Plain(lambda y: y), torch.ones(2, SIDE, dtype=torch.float16)


def of_one_name() -> object:
    return Plain(lambda y: {"x": y}), torch.ones(2, SIDE)


def of_text() -> object:
    return Plain(lambda y: {"y": y, "said": "done"}), torch.ones(2, SIDE)


def of_nothing() -> object:
    return Plain(lambda y: None), torch.ones(2, SIDE)


def named_labels() -> object:
    class Labelled(Plain):
        def forward(self, labels: Tensor) -> object:
            return self.layer(labels)

    return Labelled(None), torch.ones(2, SIDE)


def of_two_many() -> object:
    return Plain(lambda y: y), (torch.ones(2, SIDE), torch.ones(2, SIDE))


def branching() -> object:
    """A branch on values, which torch's exporter refuses."""
    return Plain(lambda y: y if bool(y.sum() > 0) else -y), torch.ones(2, SIDE)
