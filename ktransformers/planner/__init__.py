"""What fits where and how fast: sizes, hardware, placement, simulated forward. Nothing here loads weights or prints."""
