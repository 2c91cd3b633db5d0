"""Prove that an architecture's layout rules are right, by running a small random model of that architecture.

The rules say how tensors may be cut; this asks the model itself. No proof uses what the rules know: the proofs use the
model's own attention and layers, its bytes, and transformers' own tensor parallelism on real processes.

    run  ->  small  ->  shard_set, views, heads, sums, ranks, stages  ->  report

`small` makes the model and its shard set. Each proof about them is a module, and `run` has their order. `ranks` uses
`processes`, which run `worker`. The proofs need torch and transformers, which are imported once a check begins.
"""

from .processes import Ranks
from .report import CheckReport, Difference, Proof
from .run import check_arch, read_model_config

__all__ = ["CheckReport", "Difference", "Proof", "Ranks", "check_arch", "read_model_config"]
