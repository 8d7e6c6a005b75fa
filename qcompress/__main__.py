"""`python -m qcompress` is the `qcompress` command."""

from qcompress.cli import main

main()
