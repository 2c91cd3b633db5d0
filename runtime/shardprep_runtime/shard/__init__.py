"""One worker's shard: found in a folder, the cache or a store, fetched, verified and handed out as tensors.

revisions        a revision of a store: its manifest, the keys of its blobs
parts            opens parts and proves their headers and blocks
landing, fetch   a file or memory that ranges land in; the ranges of a view, in parallel, verified
fetch_processes  the same by helper processes, so that digests use more than one core
cache            the host's cache, shared by its workers
loading          the shard itself: tensors by name
prefetch         fills the cache before a worker starts; prefetch_command does so from the shell
side_files       config.json, tokenizer and the like
tensors          torch tensors of mapped bytes
filesystem       memory mapping or reads, by the file system
"""
