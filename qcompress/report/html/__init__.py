"""report.html: one file that shows a run, or several beside each other. Reads what runs wrote; no torch."""
