"""From scores to a report: statistics, the pick, terminal text, one HTML file, the live view.

`statistics`, `selection`, `build` and `formats` load only the standard library (numpy on first use);
`text` and `live` load rich, so import them where they are used.
"""
