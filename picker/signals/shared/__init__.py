"""What replicas share through Redis or Valkey, so that they decide as one: loads, prefixes, and the secret of the keys.

Owns the keys in Redis and their formats. Nothing here routes, and nothing a request waits for is here: requests read
local state, tasks keep it fresh. Without Redis every replica goes on alone.
"""
