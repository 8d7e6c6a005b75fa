"""Rules that a recipe must keep, one file a section."""
