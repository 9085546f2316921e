"""Using what was learned: images and texts of the user's own, classified by a run."""
