"""What a process finds around it: its operating system, and a launcher that started it. All else may import it; it loads no torch."""
