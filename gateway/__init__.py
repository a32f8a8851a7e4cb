"""The HTTP door of Waypost: the OpenAI-compatible relay, its ASGI app and the command line."""
