"""Bring shard sets into a store and back.

push           uploads the blobs that a store lacks, and publishes the manifest last
store_staging  lets a split write to a store, without a full copy on this machine
send           uploads one blob, in parts, resumable
pull           fetches a revision, or the ranges of one rank, into a folder
prune          lists revisions, and removes blobs that none of them names
"""
