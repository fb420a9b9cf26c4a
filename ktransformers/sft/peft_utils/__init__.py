"""Where upstream keeps what PEFT has: `mapping.get_peft_model`."""
