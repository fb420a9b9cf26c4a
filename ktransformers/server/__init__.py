"""HTTP and nothing else: JSON in, an `engine.requests.Engine` asked, JSON or events out. `app.create_app` is all of it.

A request's way: middleware (ids, keys, limits) -> app (routes) -> chat, completions, responses, messages (an API each)
-> prompts and wishes (ids and sampling) -> run (the engine asked; inbox: its events) -> choice (text) -> back as JSON,
or through streaming.
"""
