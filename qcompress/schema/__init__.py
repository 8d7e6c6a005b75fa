"""What a recipe may say: values only, no torch."""
