"""Veneer: low-rank fine-tuning on the machine you have."""
