"""Upstream's module paths: operator files and programs that were written to them find today's names there.

One thin file a path, which says once where its names are now. Nothing of this package imports it.
"""
