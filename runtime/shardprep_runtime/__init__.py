"""Start a worker from a manifest: find, fetch, verify and hand out only its own shard of a model.

A shard set is a manifest (`shardprep.json`) and the parts that it names. It lies in a folder or in a store, and serves
every tensor parallel size that divides its grain, and any pipeline stages. A worker says which set and which place:

    from shardprep_runtime import Place, open_set

    models = open_set("s3://models/llama-70b", digest="sha256:...")
    with models.load(Place(rank=3, tensor_parallel_size=8)) as shard:
        weight = shard["model.layers.0.mlp.down_proj.weight"]  # this rank's block, a torch tensor

`load` is the same in one call. `prefetch` begins to fetch before slow imports, which then run beside the download:

    from shardprep_runtime import prefetch

    fetching = prefetch("s3://models/llama-70b", rank=3, tensor_parallel_size=8)
    import torch

    with fetching.shard() as shard:
        for name, tensor in shard.iter_tensors():  # in layer order, each as soon as its bytes are verified
            print(name, tensor.shape)

`transformers_state` gives the shard to transformers' own loader. Under torchrun each process loads its own bytes:

    from shardprep_runtime import transformers_state
    from transformers import AutoConfig, AutoModelForCausalLM

    with transformers_state("llama-70b-tp8") as state:
        model = state.from_pretrained(AutoModelForCausalLM, config=AutoConfig.from_pretrained("llama-70b-tp8"))

`build_stage` makes a module of one pipeline stage's layers, and `launch` runs a whole model as such stages:

    from pathlib import Path

    from shardprep_runtime import launch
    from shardprep_runtime.workers.text.generate import Generator

    with launch("llama-70b-tp8", stages=2) as workers:
        generator = Generator.from_folder(workers.pipeline, Path("llama-70b-tp8"))
        for token in generator.stream("The way of a byte"):
            print(token.text, end="")

Rooms, each standing on those below it:

    workers    a split model: one stage a worker, a front end, OpenAI's interface
    stage      a transformers module of one pipeline stage
    engines    vLLM, SGLang, transformers and Ray read a shard set through their own loaders
    shard      one worker's shard: found, fetched, verified, handed out as tensors
    stores     S3, Google, Azure and folders, behind one protocol
    format     manifest, headers of parts, grids and views

What `__all__` names is public, and everything that is raised on purpose is a `ShardprepError`. Importing this package
imports neither torch nor numpy, nor blake3: each is imported when its first tensor or digest is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Final

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

if TYPE_CHECKING:
    from .stage.stage import Stage, build_stage
    from .workers.launch import launch
    from .workers.pipeline import Pipeline

__version__ = "0.1.0"

__all__ = [
    "Access",
    "Cache",
    "Grid",
    "Manifest",
    "Pipeline",
    "Place",
    "Prefetch",
    "Shard",
    "ShardSet",
    "ShardprepError",
    "Stage",
    "View",
    "__version__",
    "build_stage",
    "launch",
    "load",
    "open_set",
    "plan_view",
    "prefetch",
    "read_manifest",
    "transformers_state",
]

_LATER: Final = {
    "Pipeline": "workers.pipeline",
    "Stage": "stage.stage",
    "build_stage": "stage.stage",
    "launch": "workers.launch",
}
"""Public name -> its module, which is imported when the name is first asked for: a worker that loads needs none."""


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
