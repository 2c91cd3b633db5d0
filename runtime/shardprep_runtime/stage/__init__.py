"""A module of one pipeline stage, of any causal model that transformers builds of one list of layers.

stage     builds the module from a shard set
model     the model without memory, and the stage's own layers in it
weights   the stage's tensors under transformers' names
relay     the forward around the layers: what enters the first and leaves the last
kv_cache  caches of the stage's layers
trial     proves on a small model that the type can be cut
probe     what each layer gives for fixed inputs, recorded in the manifest
"""
