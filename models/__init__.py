"""Protein language models, their objectives and their published file formats: plain torch."""
