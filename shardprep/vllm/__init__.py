"""Start vLLM on a shard set, and write a shard set as vLLM's own sharded_state files.

serve          starts vLLM
sharded_state  exports a shard set as sharded_state files
rank_state     writes the state of each rank, and proves that vLLM reads it back
record         says which vLLM, in which grid, may load such files
ranks          builds vLLM's model of any rank on a CPU
"""
