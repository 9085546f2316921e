"""`python -m scripts.fuzz`."""

from . import main

main()
