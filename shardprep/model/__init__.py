"""Describe the model that a checkpoint holds: its config, its parameters, and a small model of the same kind.

describe  the tensors of a model and how each is cut, as plans and splits need them
skeleton  names and shapes of a model's parameters, without memory
shrink    a small config of the same architecture
"""
