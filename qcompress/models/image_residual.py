"""Replacements of transformers' convolutional residual modules, with quantization points at both inputs of
the addition, and of squeeze-and-excite, with points at both inputs of its product.

The output of the convolutions is the *branch*, the input that bypasses them the *skip*. The stock modules add
and multiply inside their `forward`, which hooks cannot reach, so a module with points is replaced by one of
these. A replacement keeps the children of the stock module, and so the names of its parameters.

Shapes: [batch, channels, height, width] throughout.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.efficientnet.modeling_efficientnet import (
    EfficientNetFinalBlockLayer,
    EfficientNetSqueezeExciteLayer,
)
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2InvertedResidual


class RoundedResidual(nn.Module):
    """ResNetBasicLayer and ResNetBottleNeckLayer: activation(layer(x) + shortcut(x))."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.layer, self.activation = stock.shortcut, stock.layer, stock.activation
        self.branch_point: nn.Module = nn.Identity()
        self.skip_point: nn.Module = nn.Identity()

    def forward(self, hidden_state: Tensor) -> Tensor:
        branch = self.branch_point(self.layer(hidden_state))
        return self.activation(branch + self.skip_point(self.shortcut(hidden_state)))


class RoundedProjection(nn.Module):
    """EfficientNetFinalBlockLayer of a block that adds: dropout(norm(conv(x))) + skip."""

    def __init__(self, stock: EfficientNetFinalBlockLayer) -> None:
        super().__init__()
        self.project_conv, self.project_bn, self.dropout = stock.project_conv, stock.project_bn, stock.dropout
        self.branch_point: nn.Module = nn.Identity()
        self.skip_point: nn.Module = nn.Identity()

    def forward(self, embeddings: Tensor, hidden_states: Tensor) -> Tensor:
        branch = self.branch_point(self.dropout(self.project_bn(self.project_conv(hidden_states))))
        return branch + self.skip_point(embeddings)


class RoundedInvertedResidual(nn.Module):
    """MobileNetV2InvertedResidual of a block that adds: reduce(depthwise(expand(x))) + x."""

    def __init__(self, stock: MobileNetV2InvertedResidual) -> None:
        super().__init__()
        self.expand_1x1, self.conv_3x3, self.reduce_1x1 = stock.expand_1x1, stock.conv_3x3, stock.reduce_1x1
        self.branch_point: nn.Module = nn.Identity()
        self.skip_point: nn.Module = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        branch = self.branch_point(self.reduce_1x1(self.conv_3x3(self.expand_1x1(features))))
        return branch + self.skip_point(features)


class RoundedSqueezeExcite(nn.Module):
    """EfficientNetSqueezeExciteLayer: x * sigmoid(expand(activation(reduce(mean(x))))). The pooling reads the
    rounded x too, so that nothing reads the output of the convolution in front before it is rounded. The
    factors in (0, 1) are the *gate*.
    """

    def __init__(self, stock: EfficientNetSqueezeExciteLayer) -> None:
        super().__init__()
        self.squeeze, self.reduce, self.expand = stock.squeeze, stock.reduce, stock.expand
        self.act_reduce, self.act_expand = stock.act_reduce, stock.act_expand
        self.input_point: nn.Module = nn.Identity()
        self.gate_point: nn.Module = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.input_point(hidden_states)
        gate = self.act_expand(self.expand(self.act_reduce(self.reduce(self.squeeze(x)))))
        return x * self.gate_point(gate)


ROUNDED = {
    EfficientNetFinalBlockLayer: RoundedProjection,
    EfficientNetSqueezeExciteLayer: RoundedSqueezeExcite,
    MobileNetV2InvertedResidual: RoundedInvertedResidual,
}
"""Stock modules and their replacements; others are blocks of ResNet."""


def open_addition(stock: nn.Module) -> nn.Module:
    """Replacement of `stock` with quantization points; `stock` itself if it already has them."""
    if isinstance(stock, (RoundedResidual, *ROUNDED.values())):
        return stock
    return ROUNDED.get(type(stock), RoundedResidual)(stock)
