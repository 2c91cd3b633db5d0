"""OpenAI's HTTP interface in front of a split model.

app      the application: routes, queue, streams
control  health, workers, draining, and who may ask
metrics  what Prometheus is told
openai   requests and answers of OpenAI's interface, strictly read
"""
