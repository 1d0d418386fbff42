"""Scores: frozen values that turn a block of queries and a block of keys into logits.

A score knows neither masks, softmax, dropout nor implementation; an implementation knows nothing of a score but
`prepare`, once a call, and `block`, for the tiles of what was prepared. Operands reach it folded and in the dtype to
compute in: query `(*batch, K, G, T, D)`, key `(*batch, K, S, D)`, where query head n = k * G + g reads key head k;
logits are `(*batch, K, G, T, S)`. Arrays inside a score are its parameters: traced, and differentiable.
"""

from attnlib.scores._additive import Additive, Concat
from attnlib.scores._base import Score
from attnlib.scores._custom import Custom
from attnlib.scores._inner_product import Bilinear, Dot

__all__ = ["Additive", "Bilinear", "Concat", "Custom", "Dot", "Score"]
