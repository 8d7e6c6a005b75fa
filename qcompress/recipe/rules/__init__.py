"""Rules between a recipe's values, one file for each section."""
