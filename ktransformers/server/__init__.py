"""HTTP in front of an engine: the OpenAI and Anthropic APIs. Imports nothing by itself."""
