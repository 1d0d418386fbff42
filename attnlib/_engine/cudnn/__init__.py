"""Attention by the fused kernel of NVIDIA GPUs."""
