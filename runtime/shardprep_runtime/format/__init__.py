"""What a shard set is on disk: its manifest, the headers of its parts, and which pieces are a worker's.

    manifest        what a manifest says, and the digest by which it is known
    read_manifest   bytes -> manifest, strictly
    write_manifest  manifest -> bytes
    header          the header of a part, a safetensors file
    dtypes          names and sizes of dtypes
    cut             how one dim of a tensor is cut into pieces
    grid            pipeline x tensor x expert parallel sizes, and ranks in them
    view            grid and rank -> for each tensor the pieces, in order

Arithmetic and parsing: nothing here opens a socket or makes a tensor.
"""
