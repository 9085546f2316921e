"""Bad inputs by the hundred: none may end in a traceback, in a message of more than three lines, or in anything half made.

    python -m scripts.fuzz words files choices --seconds 3600 --seed 0     all, in turns
    python -m scripts.fuzz words    values that the schema does not allow, or only just, in commands of all kinds
    python -m scripts.fuzz files    damaged files of users, of runs and of tables, and what is no file at all
    python -m scripts.fuzz choices  methods, data, shapes and hardware together at random, and what may follow a run

Needs hypothesis (`pip install 'metarun[dev]'`), which makes an input that fails as small as it can. A finding is printed
as the command that shows it; it belongs into `tests/scripts/test_fuzz.py`.
"""
