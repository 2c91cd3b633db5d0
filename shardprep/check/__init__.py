"""Prove by running it that an architecture's layout rules are right: on a small random model of that architecture.

The rules say how tensors may be cut; this asks the model itself. Each proof is made from other knowledge than the
rules': the model's own attention and layers, transformers' own tensor parallelism on real processes, and its bytes.

    run  ->  small  ->  shard_set, views, heads, sums, ranks, stages  ->  report

`small` is the model and its shard set; each proof about them is a module, and `run` has their order. `ranks` asks
`processes`, which are those of `worker`. Needs torch and transformers, which are imported once a check begins.
"""

from .processes import Ranks
from .report import CheckReport, Difference, Proof
from .run import check_arch, read_model_config

__all__ = ["CheckReport", "Difference", "Proof", "Ranks", "check_arch", "read_model_config"]
