"""What quantizes: one module for each library, run in a process of its own, maybe by another interpreter.

Nothing here imports the rest of shardprep, so that it runs in an environment that has the library alone.
"""
