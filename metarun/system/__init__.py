"""What a process finds around it: its operating system (`platform.py`), a launcher (`launched.py`). It loads no torch."""
