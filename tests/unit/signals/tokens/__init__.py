"""Reading prompts: canonical text, templates, tokenizers, engines, and the facade over them."""
