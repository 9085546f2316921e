"""Encoders: a table of items becomes a table of vectors, once, and from then on the data set is its vectors."""

from metarun.encoders.base import Encoder as Encoder
from metarun.encoders.base import Encoding as Encoding
from metarun.encoders.encoded import EncodedSource as EncodedSource
from metarun.encoders.encoded import before_encoding as before_encoding
from metarun.encoders.encoded import encoded_members as encoded_members
