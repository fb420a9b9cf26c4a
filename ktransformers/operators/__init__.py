"""Operators: modules that take the place of a model's own. One family per file, named in rules by dotted path.

Read base_operator.py first: it is the contract. Nothing is imported here: naming one file loads no other.
"""
