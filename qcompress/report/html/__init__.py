"""report.html: one self-contained page about one run or several. Reads the runs' files; no torch."""
