"""`python -m ktransformers.cli`: the `kt` program where it is not on the path."""

from ktransformers.cli import main

main()
