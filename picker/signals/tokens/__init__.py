"""From a request body to the keys of its prompt: exact token keys where ids can be had in time, byte keys always.

Tokenising runs in threads of its own or in an engine, inside a time budget. It chooses nothing and looks nothing up;
prompts never reach logs, reprs or exceptions.
"""
