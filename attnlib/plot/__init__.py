"""Pictures of attention: weights between tokens, weights over images, masks, and curves of what it costs.

matplotlib is imported when a picture is drawn, never before, so that attnlib itself does not need it. Every function
draws into the Axes it is given or into a new pyplot figure, and returns the Axes.
"""

from attnlib.plot._drawings import attention_map, attention_over_frames, attention_over_image, costs, mask

__all__ = ["attention_map", "attention_over_frames", "attention_over_image", "costs", "mask"]
