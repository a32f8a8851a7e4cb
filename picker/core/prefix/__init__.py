"""Which endpoint holds which prefix in its KV cache: keys, the index, and what is learnt where engines do not tell.

Pure: no I/O, no clock. Decoding events and tokenising are the signals' business, using what is found the scorers'.
"""
