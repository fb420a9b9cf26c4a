"""One model in use: its cache, its tokens, its sampling. No HTTP, no printing."""
