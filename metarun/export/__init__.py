"""What a run learned as a file that other programs run; README.md shows how."""
