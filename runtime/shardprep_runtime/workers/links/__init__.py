"""Steps between workers over torch.distributed, in groups of two neighbours.

transport  the front end's side: the transport `links`
link       one link: a group of two processes
served     the worker's side
"""
