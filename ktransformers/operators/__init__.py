"""Operators: modules that take the place of a model's own. One family per file; rules name them by dotted path.

Read base_operator.py first: it is the contract. Nothing is imported here, so naming one family loads no other.
"""
