"""What a person or a CI job reads. Reads JSON only; no torch."""
