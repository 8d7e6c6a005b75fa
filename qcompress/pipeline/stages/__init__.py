"""The seven stages, one file each, in the order of the pipeline: load train fold export build verify gate.

No stage imports another; they exchange artifacts only. They have their own folder because the Python API has
functions with the names of three of them (`qcompress.load`, `verify`, `gate`).
"""
