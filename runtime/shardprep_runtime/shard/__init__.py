"""One worker's shard: found in a folder, the cache or a store, fetched, verified and handed out as tensors.

shard_set        says where a shard set is and how it is read: the door to everything below
options          reads the same from JSON, YAML and command lines
revisions        names what lies where in a store, and reads its manifests
parts            opens parts, and proves their headers and blocks
landing          keeps a part while its bytes arrive, with a map of what is there
fetch            brings the blocks of a view to their landings, in parallel
fetch_processes  does so in helper processes, so that TLS uses more than one core
cache            keeps what was fetched for all workers of the host
loading          opens the parts of a view: mapped, or arriving
shard            hands out tensors by name, as their bytes arrive
tensors          makes torch tensors of mapped bytes, or joins them
prefetch         begins before the imports of a worker; prefetch_command does so from the shell
side_files       brings config.json, the tokenizer and the like
filesystem       chooses between mapping and reading
"""
