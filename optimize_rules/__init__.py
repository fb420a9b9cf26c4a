"""Packaged rule files; `README.md` here is the rule language on one page. Loaded through importlib.resources."""
