"""Scores: frozen values that compute logits from a block of queries and a block of keys.

A score is independent of masks, softmax, dropout and implementations. An implementation calls `prepare` once, and
`block` for each tile of the prepared operands. Operands are folded and in the compute dtype: query
`(*batch, K, G, T, D)` and key `(*batch, K, S, D)`, where query head n = k * G + g reads key head k. Logits are
`(*batch, K, G, T, S)`. Arrays inside a score are its parameters, which are traced and differentiable.
"""

from attnlib.scores._additive import Additive, Concat
from attnlib.scores._base import Score
from attnlib.scores._custom import Custom
from attnlib.scores._inner_product import Bilinear, Dot

__all__ = ["Additive", "Bilinear", "Concat", "Custom", "Dot", "Score"]
