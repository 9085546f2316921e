"""`python -m metarun`."""

import contextlib
import os
import sys

with contextlib.suppress(FileNotFoundError):  # a working folder that has been removed, which `main` tells
    if sys.path and sys.path[0] == os.getcwd() and not sys.flags.safe_path:
        # Python puts the working folder first, where a file of the user's hides a library's.
        sys.path.append(sys.path.pop(0))

from metarun.cli import follows, main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, int) and follows():
            # A rank that is not 0 has done its part and holds nothing. Torch's threads of its connections may outlive the
            # interpreter, which would abort the process as if it had failed.
            sys.stderr.flush()
            os._exit(ended.code)
        raise
