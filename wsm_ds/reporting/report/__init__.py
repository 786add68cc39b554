"""The report of a tuning or of recorded evaluations: one HTML page, its Markdown twin, and the JSON of both."""
