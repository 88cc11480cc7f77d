"""`answer serve`: a model over HTTP, as the OpenAI API has it.

command  flags, sockets, start and end      app      routes, limits, what goes over the wire
schema   what requests may say              replies  what answers look like
worker   the thread that owns the engine    answer   one sequence's tokens as text
choose   drawing on the host                metrics  figures for Prometheus
"""
