"""The routing core: values, plugin protocols and pure state machines.

Nothing in here does I/O, reads a clock, draws random numbers, logs or knows asyncio: time and randomness come in as
arguments.
"""
