"""How the engines are: metric pages read and scraped, engines recognised, model lists fetched.

Owns what an engine's metrics mean. Must not route, nor import the sources.
"""
