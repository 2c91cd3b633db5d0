"""Run a model that is split over workers: each holds one stage, a front end sends steps through them.

    transport  what every way of reaching workers can do: step, health, reset, promote
    worker     what a worker's process holds, whichever way it is reached
    local, links, rpc, ray_actors   the ways: this process, torch.distributed, torch.distributed.rpc, Ray
    pipeline   sends steps through the stages, and carries on when a worker is lost
    text       tokens from what the pipeline computes: sampling, stops, several sequences, a draft model
    meeting    where workers and the front end find each other, and prove to each other that they may
    launch     starts workers on this host, and what stands in front of them
    http       OpenAI's HTTP interface in front
    ray_serve  the same as an application of Ray Serve

Importing this package imports none of them, nor torch.
"""
