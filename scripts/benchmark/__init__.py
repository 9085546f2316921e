"""metarun and its peers (learn2learn, easyfsl), timed in turn on the same work: `python -m scripts.benchmark --help`."""
