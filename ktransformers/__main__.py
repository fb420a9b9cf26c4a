"""`python -m ktransformers`: the `kt` program where it is not on the path."""

from ktransformers.cli import main

main()
