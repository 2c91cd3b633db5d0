"""Run a model that is split over workers: each holds one stage, a front end sends steps through them.

    launch          puts all of it together: workers, what reaches them, what takes over for them
    launchers       who starts workers: processes of this host, people on other hosts, Ray
    worker          what a worker holds: fetch, build, step, prove, take another stage
    worker_process  a worker's process from its start to its end; tensor_group: its tensor ranks
    meeting         where workers and the front end find each other, and prove to each other that they may
    sealed          what they say there, and nobody else can; addresses: where that may be served
    transport       what every way of reaching workers can do: step, health, reset, promote
    kinds           the transports by name: links, rpc; local: workers of this process, within its memory
    pipeline        sends steps through the stages, whoever holds them
    route           mends the route where a worker is lost, as policy says
    text            tokens from what the pipeline computes: sampling, stops, several sequences, a draft model
    http            OpenAI's HTTP interface in front
    ray_serve       the same as an application of Ray Serve

Importing this package imports none of them, nor torch.
"""
