"""What fits where, and how fast: answers from a config alone, before a weight is read or a device is touched."""
