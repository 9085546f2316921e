"""The encoder of a config, and data sets encoded by it."""

from __future__ import annotations

import logging
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from metarun.config import construct
from metarun.config.schema import ENCODING_DEFAULTS
from metarun.config.values import without
from metarun.data.source import DataSource
from metarun.data.table_source import TableSource
from metarun.encoders.base import Encoder, Encoding
from metarun.encoders.encoded import EncodedSource, encoded_members, training_items
from metarun.errors import UserError

log = logging.getLogger("metarun")


def build_encoder(node: DictConfig) -> tuple[Encoder, Encoding]:
    """The encoder that `encoder` of a config names, and how it encodes.

    Raises:
        UserError: A setting is wrong, or its weights cannot be read.
    """
    shared = [item.name for item in fields(Encoding)]
    own = without(node, (*shared, "from"))
    given = {"origin": node["from"]} if node.get("from") else {}
    encoder: Encoder = construct(own, "encoder", **given)
    settings = OmegaConf.to_container(own, resolve=True)
    assert isinstance(settings, dict)
    encoder.settings = {**{str(key): value for key, value in settings.items()}, **given}
    chosen = {**ENCODING_DEFAULTS, **{key: node[key] for key in shared if key in node}}
    return encoder, Encoding(**{**chosen, "saw": chosen["saw"] or encoder.saw})


def encoded(sources: list[DataSource], node: DictConfig, *, as_target: bool = False) -> list[DataSource]:
    """Data sets whose items are replaced by the vectors of one encoder; as they are where the config has none.

    Args:
        sources: The data sets; an encoder that is fitted is fitted to the training items of the first.
        node: `encoder` of the config.
        as_target: Whether the first is a target, which is divided by its items and not by its classes.

    Raises:
        UserError: The encoder cannot encode one of them.
    """
    if not node:
        return sources
    encoder, encoding = build_encoder(node)
    for source in sources:
        if not source.members:
            raise UserError("encoder: these are regression tasks, which have no items to encode; leave encoder out")
        for member in source.members.values():
            encoder.check(member)
    if encoder.fitted:
        encoder.fit(
            item for member in sources[0].members.values() for item in training_items(member, as_target=as_target)
        )
    log.info("encoder: %s", encoder)
    members = [member for source in sources for member in source.members.values()]
    for advice in dict.fromkeys(filter(None, map(encoder.advice, members))):
        log.info("encoder: %s", advice)
    return [source.each(lambda member: EncodedSource(member, encoder, encoding)) for source in sources]


def encoded_as(items: TableSource, source: DataSource) -> TableSource:
    """A data set that is tested on, its items encoded as those of the source are; as it is where these are not encoded."""
    first = next(iter(encoded_members(source).values()), None)
    if first is None:
        return items
    first.encoder.check(items)
    return EncodedSource(items, first.encoder, first.encoding).centred_as(source)
