"""What engines say about their KV caches: events received, put in order, turned into deltas of the prefix index.

Engines publish over ZMQ which blocks they stored and dropped. A worker process receives and hashes, so that the request
loop only applies packed deltas. Must not route, nor know the index.
"""
