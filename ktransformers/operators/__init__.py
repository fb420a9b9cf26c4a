"""Operators: modules that take the place of a model's. One family per file, which rules name by path.

Read base_operator.py first: it is the contract. Nothing is imported here: naming one file loads no other.
"""
