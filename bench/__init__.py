"""Every figure of README, docs and RESULTS.md: `python -m bench.NAME` prints a table and, last, one JSON line."""
