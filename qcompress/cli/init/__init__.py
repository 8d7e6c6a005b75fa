"""A first recipe for a model and a file of data: what `qcompress init` looks at, chooses and writes."""
