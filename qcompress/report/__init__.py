"""Terminal tables, CI formats and the HTML page. Reads JSON only; no torch."""
