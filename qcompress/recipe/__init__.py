"""Reading, merging, validating and checking a recipe. No torch."""
