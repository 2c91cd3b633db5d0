"""Prepare model weights for the workers that run them.

A checkpoint is an index of bytes; everything is a plan over that index and one mover that carries it out:

    source/  ->  index  ->  layout/  ->  write/  ->  parts and a manifest  ->  publish/  ->  shardprep_runtime

`convert` is the plan with whole tensors, `split` the plan with pieces, `export` the plan back:

    from shardprep.split import split

    split("llama-70b", "llama-70b-tp8", tensor_parallel_size=8)

`cli/` puts the verbs on the command line. `fit/` answers what fits where, `quantize/` makes 4-bit checkpoints, `check/`
proves an architecture, `vllm/` starts vLLM. docs/architecture.md has each room in a line.
"""

from shardprep_runtime import __version__

__all__ = ["__version__"]
