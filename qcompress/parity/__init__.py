"""Parity: each form of a model measured on shared samples, and the distance between consecutive forms."""
