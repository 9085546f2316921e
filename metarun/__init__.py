"""metarun: meta-learning experiments from the shell."""

__version__ = "0.2.0"
