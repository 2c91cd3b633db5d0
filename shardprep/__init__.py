"""Prepare model weights for the workers that run them.

A checkpoint is an index of bytes; everything is a plan over that index and one mover that carries it out:

    source/  ->  Index  ->  plan  ->  write  ->  parts and a manifest  ->  shardprep_runtime.load

`convert` is the plan with whole tensors, `split` the plan with pieces, `export` the plan back.
"""

from shardprep_runtime import __version__

__all__ = ["__version__"]
