"""Recipes: reading, merging, validating and checking. No torch."""
