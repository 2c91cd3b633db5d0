"""Read the index of a checkpoint, whatever it was made by, without executing anything in it."""

from .checkpoint import read_checkpoint
from .locate import open_source
from .shard_set import locate_pieces, open_parts, read_shard_set
from .source import Source

__all__ = [
    "Source",
    "locate_pieces",
    "open_parts",
    "open_source",
    "read_checkpoint",
    "read_shard_set",
]
