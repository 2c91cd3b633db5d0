"""Prepare model weights for the workers that run them.

A checkpoint is an index of bytes; everything is a plan over that index and one mover that carries it out:

    source/  ->  index  ->  layout/  ->  write/  ->  parts and a manifest  ->  publish/  ->  shardprep_runtime

The verbs are modules, each with the function that a command of the same name calls. `split` writes a shard set, which
serves every tensor parallel size that divides its grain. `verify` checks it, and `export` gives the checkpoint back:

    from pathlib import Path

    from shardprep.export import export
    from shardprep.split import split
    from shardprep.verify import verify

    report = split("llama-70b", "llama-70b-tp8", tensor_parallel_size=8)
    verify(Path("llama-70b-tp8"), manifest_digest=report.manifest_digest)
    export(Path("llama-70b-tp8"), Path("restored"))

`publish` sends a shard set to a store and fetches from it. Only what is missing travels:

    from shardprep.publish.pull import pull
    from shardprep.publish.push import push
    from shardprep_runtime import Place

    push(Path("llama-70b-tp8"), "s3://models/llama-70b")
    pull("s3://models/llama-70b", Path("here"), place=Place(rank=3, tensor_parallel_size=8))

A worker needs none of this package: `shardprep_runtime` loads its shard.

    cli          the verbs on the command line, one file a command
    check        proofs that a layout gives an engine what it needs
    quantize     4-bit checkpoints by GPTQ and AWQ, measured afterwards
    convert, split, export, verify, inspect
                 the verbs
    fit          what fits where, and how fast it starts
    vllm         starting vLLM, and writing its own sharded files
    publish      push, pull, revisions, prune
    write        the plan of parts, and the mover that writes them
    model        a model's modules from its config.json alone
    layout       how each tensor of an architecture may be cut
    source       checkpoints of any kind, read without executing anything in them
    index        what a checkpoint holds, and where its bytes lie

docs/architecture.md has each room in two lines, and how a byte travels through them. `__all__` names the modules whose
functions are public.
"""

from shardprep_runtime import __version__

__all__ = [
    "__version__",
    "convert",
    "export",
    "fit",
    "inspect",
    "publish",
    "quantize",
    "split",
    "verify",
]
