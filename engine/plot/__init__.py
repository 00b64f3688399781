"""Pictures of results: SVG of our own, the same bytes for the same numbers; PNG through matplotlib where it is installed."""
