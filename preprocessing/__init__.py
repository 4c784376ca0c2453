"""Offline, CPU-only preparation of protein corpora: FASTA in, sharded Arrow records out."""
