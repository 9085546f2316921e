"""metarun and learn2learn, timed in turn on the same work: `python -m scripts.benchmark --help`."""
