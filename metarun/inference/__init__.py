"""Using what was learned: images of the user's own, classified by a run."""
