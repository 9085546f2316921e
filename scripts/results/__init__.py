"""The tables of results: which command makes which row, what the runs gave, and the Markdown: `python -m scripts.results --help`."""
