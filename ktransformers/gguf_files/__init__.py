"""A model as one .gguf, both ways: config, tokenizer and weights."""
