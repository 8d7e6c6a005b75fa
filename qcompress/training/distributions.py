"""Distributions before and after compression, for the HTML report: distributions.json, of bounded size.

    weights      SNR of each layer: trained weight against deployed codes times scale
    histograms   trained and deployed weights over shared bins, for the layers with the lowest SNR
    sites        largest and median channel magnitude at an adapter's sites, before and after
    channels     histograms of channel magnitudes, and the top channels, for sites with the largest outliers

A channel's magnitude is the float model's largest on the calibration data; after the adapter it is multiplied
by the final scale. Channels that are 0 on all calibration data are counted as silent and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompress.models.architecture import Site
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import Prepared
from qcompress.models.rebuild import frozen_weight
from qcompress.quant.layers import QuantizedWeight
from qcompress.quant.ranges import Statistics
from qcompress.quant.rescaling import site_largest
from qcompress.system.artifacts import read_json, write_json

NAME = "distributions.json"
KEPT = "checkpoint-channels.json"
"""Pre-adapter channel magnitudes, saved so that a resumed run need not observe again."""

WORST = 4
"""Number of layers, and of sites, with histograms."""

BINS, CHANNEL_BINS, TOP = 48, 24, 16
"""Bins of a weight's histogram and of a site's; channels of a site that are listed."""

DIGITS = 6


def keep_channels(sites: Sequence[Site], statistics: Mapping[str, Statistics], out: Path) -> None:
    """Save the pre-adapter channel magnitudes of each site whose readers were observed."""
    seen = {site.writer: site_largest(statistics, site.readers, site.maps, site.channels) for site in sites}
    write_json(
        out / KEPT, {writer: largest.tolist() for writer, largest in seen.items() if largest is not None}
    )


@torch.no_grad()
def save_distributions(prepared: Prepared, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write distributions.json; `tensors` are those of trained.safetensors."""
    plans = {item.name: item for item in prepared.plan}
    pairs = {name: (prepared.layers[name], plans[name]) for name, _ in prepared.weight_quantizers()}
    weights = [_noise(name, *_both(layer, item, tensors)) for name, (layer, item) in pairs.items()]
    measured = [entry for entry in weights if entry["snr_db"] is not None]
    worst = sorted(measured, key=lambda entry: entry["snr_db"])[:WORST]
    before = read_json(out / KEPT) if (out / KEPT).is_file() else {}
    sites = [
        _Channels(writer, np.array(largest), tensors[f"{writer}.rescale"].float().numpy())
        for writer, largest in before.items()
    ]
    outlying = sorted(sites, key=lambda site: -site.outlier)[:WORST]
    write_json(
        out / NAME,
        {
            "weights": weights,
            "histograms": [
                {**entry, **_histogram(*_both(*pairs[entry["layer"]], tensors))} for entry in worst
            ],
            "sites": [site.summary() for site in sites],
            "channels": [site.histogram() for site in outlying],
        },
    )


# Weights ------------------------------------------------------------------------------------------


def _both(layer: QuantizedWeight, item: LayerPlan, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Trained weight of a layer, and the deployed weight that replaces it."""
    weight = layer.coded_weight().float()
    frozen = frozen_weight(item, tensors, layer.channel_axis).to(weight.device)
    return weight, frozen(weight)


def _noise(name: str, weight: Tensor, deployed: Tensor) -> dict[str, Any]:
    signal = weight.square().sum(dtype=torch.float64).item()
    noise = (weight - deployed).square().sum(dtype=torch.float64).item()
    snr = _short(10 * math.log10(signal / noise)) if signal and noise else None
    return {"layer": name, "values": weight.numel(), "snr_db": snr}


def _histogram(weight: Tensor, deployed: Tensor) -> dict[str, Any]:
    both = [tensor.cpu().numpy().ravel() for tensor in (weight, deployed)]
    limit = max(float(np.abs(values).max()) for values in both)
    edges = np.linspace(-limit, limit, BINS + 1)
    counts = [np.histogram(values, edges)[0].tolist() for values in both]
    return {"edges": _shorts(edges), "float": counts[0], "deployed": counts[1]}


# Channels -----------------------------------------------------------------------------------------


class _Channels:
    """Magnitudes of one site's channels, [channels], before and after an adapter."""

    def __init__(self, writer: str, before: np.ndarray, scale: np.ndarray) -> None:
        self.writer = writer
        self.channel = np.flatnonzero(before > 0)
        self.silent = len(before) - len(self.channel)
        self.before, self.after = before[self.channel], (before * scale)[self.channel]

    @property
    def outlier(self) -> float:
        """Largest channel magnitude divided by the median, before the adapter."""
        return float(self.before.max() / np.median(self.before)) if len(self.before) else 0.0

    def summary(self) -> dict[str, Any]:
        """Largest and median channel magnitude, before and after the adapter."""

        def ends(values: np.ndarray) -> dict[str, float | None]:
            if not len(values):
                return {"largest": None, "median": None}
            return {"largest": _short(values.max()), "median": _short(np.median(values))}

        counts = {"channels": len(self.channel) + self.silent, "silent": self.silent}
        return {"site": self.writer, **counts, "before": ends(self.before), "after": ends(self.after)}

    def histogram(self) -> dict[str, Any]:
        """Histogram of channel magnitudes in bins of equal ratios, and the largest channels by index."""
        if not len(self.before):
            return {"site": self.writer, "edges": [], "before": [], "after": [], "top": []}
        both = np.concatenate([self.before, self.after])
        edges = np.geomspace(both.min() * (1 - 1e-6), both.max() * (1 + 1e-6), CHANNEL_BINS + 1)
        counts = [np.histogram(values, edges)[0].tolist() for values in (self.before, self.after)]
        order = np.argsort(-self.before, kind="stable")[:TOP]
        top = [
            {
                "channel": int(self.channel[at]),
                "before": _short(self.before[at]),
                "after": _short(self.after[at]),
            }
            for at in order
        ]
        return {
            "site": self.writer,
            "edges": _shorts(edges),
            "before": counts[0],
            "after": counts[1],
            "top": top,
        }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _shorts(values: np.ndarray) -> list[float]:
    return [_short(value) for value in values]
