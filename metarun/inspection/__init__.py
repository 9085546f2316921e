"""A data set looked at before it is used: what it holds, what is wrong with it, which tasks fit, how long training would take.

`command.py` is `recipe=inspect`. `facts.py` gathers what is told, with `image_files.py` (sizes, depths, unreadable files), `duplicates.py`
(images that are there twice) and `timing.py` (how long a training would take); `terminal.py` and `page.py` show it in the sentences of
`words.py`.
"""
