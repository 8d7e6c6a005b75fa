"""Sensitivity studies: the cost of quantizing each layer, and a mixture of formats within a budget.

candidates.py   candidate formats, their bytes, and recipes with them                   no torch
sampling.py     samples for choosing a mixture, and samples for judging it              no torch
calibrated.py   calibration and measurement of a recipe; costs of layers are cached
measure.py      divergence from the float model, layer by layer
controls.py     mixtures of equal size chosen by other costs, for comparison            no torch
mixture.py      cheapest choice within a budget, by integer programming                 no torch
study.py        `qcompress sensitivity`
"""
