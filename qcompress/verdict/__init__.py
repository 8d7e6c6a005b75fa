"""Judging a run, one run against another or against a baseline; reading a run directory. No torch."""
