"""What each layer costs when it is rounded, and which format of each layer fits a budget.

candidates.py   formats to try, the bytes that they take, the recipe that has them      no torch
measure.py      divergence from the float model, layer by layer
mixture.py      the cheapest choice within a budget, by integer programming             no torch
study.py        `qcompress sensitivity`
"""
