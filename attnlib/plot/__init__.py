"""Plots of attention: weights between tokens, weights over images, masks, and measured costs.

Each function draws into the given Axes or into a new pyplot figure, and returns the Axes. attnlib imports matplotlib
only when a function draws.
"""

from attnlib.plot._drawings import attention_map, attention_over_frames, attention_over_image, costs, mask

__all__ = ["attention_map", "attention_over_frames", "attention_over_image", "costs", "mask"]
