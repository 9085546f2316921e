"""metarun: meta-learning and transfer learning from the shell."""

__version__ = "0.1.0"
