"""The only client that speaks to model servers: connection pools, credentials, connect deadlines, cancellation.

The relay, probes and scraping use it. It chooses no endpoint and retries nothing.
"""
