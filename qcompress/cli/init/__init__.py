"""`qcompress init`: a first recipe for a model and a data file."""
