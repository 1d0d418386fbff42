"""Attention tile by tile, in memory linear in the lengths."""
