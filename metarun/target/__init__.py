"""Putting what was learned on a source to use on a small target."""
