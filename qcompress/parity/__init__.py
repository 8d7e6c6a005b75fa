"""Measuring each form of a model on the same samples, and the distance from one form to the next."""
