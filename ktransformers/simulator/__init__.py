"""A whole forward pass on devices that need not exist."""
