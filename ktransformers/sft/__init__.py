"""Fine-tuning, thin over PEFT and TRL: adapters, and what becomes of them."""
