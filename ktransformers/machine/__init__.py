"""What a machine is: processor, memory, GPUs, and the units they are told in."""
