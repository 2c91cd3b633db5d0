"""The model that a checkpoint is of: config.json, its parameters, a small one of the same kind.

describe  the model of a config.json
skeleton  names and shapes of its parameters, without memory
shrink    a small config of the same architecture
"""
