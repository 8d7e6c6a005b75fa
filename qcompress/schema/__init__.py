"""Schema of a recipe: values only, no torch."""
