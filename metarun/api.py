"""What `import metarun` offers to Python; imported when it is first used."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from metarun.config.folder import CONF
from metarun.config.validation import check_hydra
from metarun.engine.hardware import process_as_it_was
from metarun.errors import Incomplete, UserError
from metarun.files import given_path
from metarun.runs.logger import logging_as_it_was
from metarun.shell.arguments import for_hydra, parsed
from metarun.shell.messages import MENDABLE, one_line, raised_by_hydra
from metarun.shell.recipe import carried_out, swept

_ONE_RUN = threading.RLock()  # one thread may start a run inside a run

log = logging.getLogger("metarun")


def run(*words: str, outputs: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Carries out `metarun words...`, or goes on with it, or takes its stored result.

    It may be called in any thread, and inside a program that is an app of Hydra. Runs of one process share PyTorch's generator of random
    numbers, so of several threads one runs and the others wait; runs at once are for processes. A run that is not in the main thread is
    told of no signal, and saves at its intervals alone. Afterwards PyTorch's generators, its threads and precision, and the
    logger `metarun`, are as they were before; what the caller has set for itself, such as torch's default type, changes no number.

    Args:
        words: The words of the command line, each `key=value` or `group=choice`.
        outputs: The folder that run folders lie in, as `outputs=` gives it.

    Returns:
        What `result.json` holds, and under `folder` the run's folder.

    Raises:
        UserError: What the command would refuse, in the same words.
    """
    if wrong := [word for word in words if not isinstance(word, str)]:
        raise UserError(
            f"metarun.run: {type(wrong[0]).__name__} is no word; give words such as 'algo=maml' one by one, of a list run(*words)"
        )
    if outputs is not None:
        given_path(outputs, "outputs")
    given = [*words, *([f"outputs={os.fsdecode(outputs)}"] if outputs is not None else [])]
    try:
        arguments, options = parsed(given)
        if options:
            raise UserError(f"{options[0]}: metarun.run carries out one run; it takes key=value alone")
        typed = for_hydra(arguments)
        with _ONE_RUN, process_as_it_was(), logging_as_it_was(), _own_hydra():
            config = hydra.compose("config", overrides=typed, return_hydra_config=True)
            check_hydra(config.hydra)
            HydraConfig.instance().set_config(config)
            OmegaConf.set_readonly(config, False)
            own = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
            return carried_out(own, typed, config.hydra.runtime.choices, swept(config.hydra.sweeper))
    except Incomplete as left_out:
        log.warning("%s", left_out)
        return left_out.result
    except UserError:
        raise
    except (*MENDABLE, ValueError, AssertionError) as error:
        # Hydra meets some mistakes with a bare ValueError, or an assertion.
        if not isinstance(error, MENDABLE) and not raised_by_hydra(error):
            raise
        raise UserError(one_line(error, given)) from error


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Has Hydra compose metarun's configs, and puts back afterwards what it was at before: another app of it, say."""
    app, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = app
        HydraConfig.instance().cfg = config
