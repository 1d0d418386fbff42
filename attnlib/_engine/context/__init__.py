"""Attention of a sequence that is sharded over many devices."""
