"""Read the index of a checkpoint, whatever it was made by, without executing anything in it."""

from .checkpoint import read_checkpoint
from .shard_set import locate_pieces, open_parts, read_shard_set

__all__ = ["locate_pieces", "open_parts", "read_checkpoint", "read_shard_set"]
