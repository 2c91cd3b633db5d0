"""Start a worker from a manifest: map, verify and hand out only its own shard.

A worker loads what is its own, from a folder or a store, with a digest for every block:

    from shardprep_runtime import load

    with load("s3://models/llama-70b", tensor_parallel_size=8, rank=3, cache="/var/cache/shardprep") as shard:
        weight = shard["model.layers.0.mlp.down_proj.weight"]  # a torch tensor of this rank's block

Rooms, each standing on those below it:

    workers    a split model: one stage a worker, a front end, OpenAI's interface
    stage      a transformers module of one pipeline stage
    engines    vLLM, SGLang, transformers and Ray read a shard set through their own loaders
    shard      one worker's shard: found, fetched, verified, handed out as tensors
    stores     S3, Google, Azure and folders, behind one protocol
    format     manifest, headers of parts, grids and views

Importing this package imports neither torch nor numpy, nor blake3: each is imported when its first tensor or digest is
asked for.
"""

from .engines.transformers_state import transformers_state
from .errors import ShardprepError
from .format.grid import Grid
from .format.manifest import Manifest
from .format.read_manifest import read_manifest
from .format.view import Place, View, plan_view
from .shard.cache import Cache
from .shard.prefetch import Prefetch
from .shard.shard import Shard
from .shard.shard_set import ShardSet, load, open_set, prefetch
from .stores.store import Access

__version__ = "0.1.0"

__all__ = [
    "Access",
    "Cache",
    "Grid",
    "Manifest",
    "Place",
    "Prefetch",
    "Shard",
    "ShardSet",
    "ShardprepError",
    "View",
    "__version__",
    "load",
    "open_set",
    "plan_view",
    "prefetch",
    "read_manifest",
    "transformers_state",
]
