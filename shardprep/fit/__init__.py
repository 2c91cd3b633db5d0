"""What fits where: the command `plan`.

report    devices, context and users -> what it takes, layout by layout
search    the layouts that fit, best first
budget    memory of one worker, summed
kv_cache  bytes of caches, by architecture
weights   bytes of weights, by stage and rank
"""
