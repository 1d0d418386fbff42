"""Caches of keys and values, to decode one or several tokens at a time.

A slot is an index of the cache. A position is the index of a token in its sequence, from 0. Masks, causality and
`score_mod` see positions, so decoding in any split gives the output of one pass over all tokens.
"""

from attnlib.cache._kv_cache import KVCache
from attnlib.cache._paged import PagedKVCache

__all__ = ["KVCache", "PagedKVCache"]
