"""`python -m metarun`, and the command `metarun`: what has to be done before anything else is imported."""

import contextlib
import os
import sys


def main() -> None:
    """Carries out the command line, see `metarun.cli`."""
    with contextlib.suppress(FileNotFoundError):  # a working folder that has been removed, which `cli` tells
        if sys.path and sys.path[0] == os.getcwd() and not sys.flags.safe_path:
            # Python puts the working folder first, where a file of the user's hides a library's.
            sys.path.append(sys.path.pop(0))
    import signal

    # Ends at once and without a word, as nothing is begun while modules are imported; `cli` hears it from then on. A job in a
    # shell's background ignores it, and goes on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from metarun import cli

    try:
        cli.main()
    except SystemExit as ended:
        if isinstance(ended.code, int) and cli.follows():
            # A rank that is not 0 has done its part and holds nothing. Torch's threads of its connections may outlive the
            # interpreter, which would abort the process as if it had failed.
            sys.stderr.flush()
            os._exit(ended.code)
        raise


if __name__ == "__main__":
    main()
