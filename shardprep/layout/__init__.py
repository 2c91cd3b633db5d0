"""Say how each tensor of a model may be cut and which layer it belongs to, from its config and its names alone."""

from .rules import ModelLayout, Placed, derive_layout, known_types, normalize, ties_head

__all__ = ["ModelLayout", "Placed", "derive_layout", "known_types", "normalize", "ties_head"]
