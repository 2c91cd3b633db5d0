"""Who starts the workers of a split model, and starts others for those that are lost.

    launcher    what a launcher says and does, and where its workers meet the front end
    crew        the workers that were started: who is there, who has failed, who is to come
    processes   Processes: of this host
    elsewhere   Elsewhere: `shardprep worker`s that people or Kubernetes start, on any host
    ray_actors  RayActors: placed by Ray
    in_process  InThisProcess: no worker is started, all stages are here
    words       which of them `--transport` names

A launcher carries no steps: that is its transport's.
"""
