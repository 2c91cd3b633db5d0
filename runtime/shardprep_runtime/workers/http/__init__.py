"""OpenAI's HTTP interface in front of a split model.

app     the application: routes, queue, metrics
openai  requests and answers of OpenAI's interface, strictly read
"""
