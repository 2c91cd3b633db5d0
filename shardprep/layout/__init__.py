"""Say how each tensor of a model may be cut and which layer it belongs to, from its config and its names alone."""

from .packed import PackedModel, lay_out
from .quantization import Scheme, read_scheme
from .rules import ModelLayout, Placed, derive_layout, known_types, normalize, ties_head

__all__ = [
    "ModelLayout",
    "PackedModel",
    "Placed",
    "Scheme",
    "derive_layout",
    "known_types",
    "lay_out",
    "normalize",
    "read_scheme",
    "ties_head",
]
