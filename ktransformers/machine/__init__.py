"""What a machine is: processor, memory, GPUs, and the units of sizes and rates."""
