"""What changes a method's training loss, or the tasks that it is given, and nothing else of it. README.md shows how to write one."""
