"""What each layer costs when it is rounded, and which format of each layer fits a budget.

candidates.py   formats to try, the bytes that they take, the recipe that has them      no torch
sampling.py     the samples that choose, and those that judge                           no torch
calibrated.py   a recipe calibrated and measured; costs of layers are kept in the cache
measure.py      divergence from the float model, layer by layer
controls.py     mixtures of the same size by other costs, to hold the measured one against   no torch
mixture.py      the cheapest choice within a budget, by integer programming             no torch
study.py        `qcompress sensitivity`
"""
