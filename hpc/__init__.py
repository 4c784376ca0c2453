"""Distributed training of protein language models, and the command line of all stages."""
