"""A run: what its stages share, how it is carried out, and what it leaves."""
