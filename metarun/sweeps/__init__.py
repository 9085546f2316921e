"""Many runs from one command: sweepers, launchers, and the jobs between them. README.md shows how to write a launcher."""
