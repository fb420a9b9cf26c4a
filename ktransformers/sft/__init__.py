"""Fine-tuning with low-rank adapters: training files, data and training, thin over PEFT and TRL.

Needs the extra `sft` (peft, trl, datasets). What computes is in `ktransformers.operators`: any model that rules were
applied to can be given to PEFT, Trainer and TRL without this package.
"""
