"""Steps by torch.distributed.rpc, as the seed design and split training have it: all processes in one group from the start.

transport  the front end's side: the transport `rpc`
group      in and out of the group of processes; what a worker answers there
presence   which workers answer, have ended or hang
"""
