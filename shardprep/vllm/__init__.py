"""What is vLLM's own: starting it on a shard set, and its sharded-state files.

serve          the command that starts vLLM
sharded_state  vLLM's sharded-state files of a shard set
ranks          the ranks of a vLLM that has no GPU, which say what such a file must hold
"""
