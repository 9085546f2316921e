"""`python -m metarun`."""

import os
import sys

if sys.path and sys.path[0] == os.getcwd() and not sys.flags.safe_path:
    sys.path.append(
        sys.path.pop(0)
    )  # Python puts the working folder first, where a file of the user's hides a library's

from metarun.cli import main

if __name__ == "__main__":
    main()
