"""Modifiers of logits to pass as `score_mod`: biases by position, a soft cap, and activations in the place of exp.

No tile ever holds an array of all pairs.

Each is a function of (logit, batch, head, query_position, key_position), all scalars; the library batches it. They
compose as functions do: `lambda logit, *where: cap(alibi(logit, *where), *where)`.
"""

from attnlib.modifiers._activations import LogRelu, LogSigmoid
from attnlib.modifiers._biases import ALiBi, BucketedBias, RelativeBias, SoftCap, alibi_slopes

__all__ = ["ALiBi", "BucketedBias", "LogRelu", "LogSigmoid", "RelativeBias", "SoftCap", "alibi_slopes"]
