"""Model of the family `cifar-resnet`, in torch.

Shapes: pixel values [batch, channels, height, width], for CIFAR 3 x 32 x 32; logits [batch, labels].
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Answer(NamedTuple):
    """Output of the model, with transformers' field names."""

    logits: Tensor


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), with a quantization point at each input of the
    addition.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - inputs
        self.branch_point: nn.Module = nn.Identity()
        self.skip_point: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(self.branch_point(branch) + self.skip_point(self._shortcut(x)))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Option A of He et al., section 3.3, without parameters. Half of the new channels come first."""
        if self.stride == 1 and self.added == 0:
            return x
        half = self.added // 2
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, half, self.added - half))


class CifarResNet(nn.Module):
    """Network of section 4.2 of arXiv:1512.03385; `repeats` blocks in each stage of these widths."""

    def __init__(self, repeats: int, widths: tuple[int, ...], channels: int, labels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU()
        inputs = widths[0]
        for stage, width in enumerate(widths):
            strides = [1 if stage == 0 else 2, *[1] * (repeats - 1)]
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for index, stride in enumerate(strides):
                blocks[str(index)] = Block(inputs, width, stride)
                inputs = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(blocks))
        self.stages = len(widths)
        self.linear = nn.Linear(inputs, labels)

    def forward(self, pixel_values: Tensor) -> Answer:
        x = self.act1(self.bn1(self.conv1(pixel_values)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return Answer(self.linear(x.mean((2, 3))))
