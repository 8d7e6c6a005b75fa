"""Regression gate: compares a candidate run with a baseline run or with a promoted baseline.json.
No torch.
"""
