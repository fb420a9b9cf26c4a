"""The folder that `ktransformers.optimize` looks in for a module of its own name: upstream's path of the front door."""
