"""The data sets: an episode is a function of the seed, the split and a number. README.md shows how to write one."""
