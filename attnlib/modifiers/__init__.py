"""Modifiers of logits to pass as `score_mod`: biases by position that no tile ever holds whole, and a soft cap.

Each is a function of (logit, batch, head, query_position, key_position), all scalars; the library batches it. They
compose as functions do: `lambda logit, *where: cap(alibi(logit, *where), *where)`.
"""

from attnlib.modifiers._biases import ALiBi, BucketedBias, RelativeBias, SoftCap, alibi_slopes

__all__ = ["ALiBi", "BucketedBias", "RelativeBias", "SoftCap", "alibi_slopes"]
