"""Start a worker from a manifest: map, verify and hand out only its own shard.

    manifest  ->  view  ->  parts  ->  tensors  ->  load

`manifest` says what a shard set holds, `view` what is this worker's, `parts` opens and proves files, `tensors`
makes tensors of mapped bytes, `load` puts them together. Importing this package imports neither torch nor numpy,
nor blake3: each is imported when its first tensor or digest is asked for.
"""

from .engines.transformers_state import transformers_state
from .errors import ShardprepError
from .format.grid import Grid
from .format.manifest import Manifest
from .format.manifest import read as read_manifest
from .format.view import View, plan_view
from .shard.cache import Cache
from .shard.loading import Shard, load
from .shard.prefetch import Prefetch, prefetch
from .stores.store import Access

__version__ = "0.1.0"

__all__ = [
    "Access",
    "Cache",
    "Grid",
    "Manifest",
    "Prefetch",
    "Shard",
    "ShardprepError",
    "View",
    "__version__",
    "load",
    "plan_view",
    "prefetch",
    "read_manifest",
    "transformers_state",
]
