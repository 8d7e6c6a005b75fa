"""Judges a run by its goals, compares runs, and reads run directories. No torch."""
