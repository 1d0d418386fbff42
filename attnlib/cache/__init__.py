"""The keys and values of the tokens so far, for decoding one or many tokens at a time.

A slot is a place in the cache; a position is that of a token in its sequence, from 0. Masks of positions, causality and
`score_mod` see positions, so that what a split pass gives is what the whole pass gives, however it is split.
"""

from attnlib.cache._kv_cache import KVCache

__all__ = ["KVCache"]
