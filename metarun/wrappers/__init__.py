"""What changes a method's training loss and nothing else of it. README.md shows how to write one."""
