"""The command line: what its words mean to Hydra, and what is said of words that mean nothing.

`arguments.py` tells options from overrides and puts these into Hydra's grammar, `messages.py` makes one line of an error,
`one_composition.py` spares a single run Hydra's first composition, and `recipe.py` hands the config to the recipe. `metarun.cli`
is the door.
"""
