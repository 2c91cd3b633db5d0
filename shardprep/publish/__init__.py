"""A shard set to a store and back.

push   uploads what a revision lacks, and publishes its manifest last
send   one blob, in parts, resumable
pull   a revision, or the ranges of one view, into a folder
prune  removes blobs that no revision names
"""
