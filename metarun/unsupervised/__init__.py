"""Training tasks from images without labels; README.md shows how to write another way of making them."""
