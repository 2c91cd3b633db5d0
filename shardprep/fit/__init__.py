"""Say what fits where: the library behind the command `plan`.

report    devices and workload -> every layout with its memory, and the recommended one
search    the layouts that fit, best first
budget    memory of one worker, summed
kv_cache  bytes of caches, by architecture
weights   bytes of weights, by stage and rank
"""
