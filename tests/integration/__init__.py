"""Real sockets: simulated engines, the real Envoy, the real openai SDK."""
