"""Numerics: quantization of tensors to integers. Knows no model, recipe, file or command line.

Shapes, here and below: a weight is [in, out] (`channel_axis` 1) or [out, in] (`channel_axis` 0); its scale is
[out] per channel and, per block of input channels, [in // block, out] or [out, in // block]. Activations are
[..., channels] with a scale [] for the whole tensor. Rounding is half to even everywhere, and values are
divided by the scale, never multiplied by its reciprocal, as in QuantizeLinear.
"""
