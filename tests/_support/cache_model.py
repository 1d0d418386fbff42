"""Caches as lists of tokens, which any edits of a cache are compared with."""

import math

import numpy as np

LOST = None  # a token that the cache no longer has


def random_tokens(draw, shape, heads, kv_heads, features, value_features):
    """(query, key, value)."""
    sizes = (heads, features), (kv_heads, features), (kv_heads, value_features)
    return [draw.normal(size=(*shape, *size)).astype(np.float32) for size in sizes]


def attend(query, tokens, value_features):
    """Attention of one query (N, D) over a list of (key (K, D), value (K, E)); NaN if one is lost, 0 without tokens."""
    heads = query.shape[0]
    if not tokens or any(token is LOST for token in tokens):
        return np.full((heads, value_features), np.nan if tokens else 0, np.float32)
    key, value = (np.stack(x).astype(np.float64) for x in zip(*tokens, strict=True))
    key, value = (np.repeat(x, heads // x.shape[1], 1) for x in (key, value))
    weights = np.exp(np.einsum("nd,snd->ns", query, key) * query.shape[-1] ** -0.5)
    return np.einsum("ns,sne->ne", weights / weights.sum(-1, keepdims=True), value).astype(np.float32)


class PagedModel:
    """Lists of tokens, and for each sequence a list of its pages, which are numbers."""

    def __init__(self, num_sequences, num_pages, page_size, capacity):
        self.num_pages, self.page_size, self.capacity = num_pages, page_size, capacity
        self.tokens, self.pages = ([[] for _ in range(num_sequences)] for _ in range(2))
        self._last_page = 0

    @property
    def free_pages(self):
        return self.num_pages - len({page for pages in self.pages for page in pages})

    def fork(self, source, target):
        self.tokens[target], self.pages[target] = list(self.tokens[source]), list(self.pages[source])

    def truncate(self, b, length):
        self.tokens[b], self.pages[b] = self.tokens[b][:length], self.pages[b][: math.ceil(length / self.page_size)]

    def append(self, new):
        """A list of tokens to each sequence. Pages are given in order, and a shared one is copied by all but one."""
        free, asked = self.free_pages, 0
        before = [list(pages) for pages in self.pages]
        writers = {}  # of the pages that are partly filled
        for b, tokens in enumerate(new):
            if tokens and self._fits(b, tokens) and len(self.tokens[b]) % self.page_size:
                writers.setdefault(self.pages[b][-1], []).append(b)
        for b, tokens in enumerate(new):
            if not tokens:
                continue
            start = len(self.tokens[b])
            fits, pages = self._fits(b, tokens), list(before[b])
            if fits and start % self.page_size:
                holders = [other for other, held in enumerate(before) if pages[-1] in held]
                if len(holders) > 1 and (holders != writers[pages[-1]] or b != holders[0]):
                    pages.pop()
            if fits:
                needed = math.ceil((start + len(tokens)) / self.page_size) - len(pages)
                asked += needed
                fits = needed == 0 or asked <= free
            if fits:
                self.pages[b] = pages + [self._new_page() for _ in range(needed)]
                self.tokens[b] = self.tokens[b] + tokens
            else:
                whole = start // self.page_size * self.page_size
                self.pages[b] = before[b][: start // self.page_size]
                self.tokens[b] = self.tokens[b][:whole] + [LOST] * (start - whole + len(tokens))

    def _fits(self, b, tokens):
        return LOST not in self.tokens[b] and len(self.tokens[b]) + len(tokens) <= self.capacity

    def _new_page(self):
        self._last_page += 1
        return self._last_page


class RingModel:
    """A list of tokens, and for each slot of a ring the number of the token that was written there last."""

    def __init__(self, capacity, window):
        self.capacity, self.window = capacity, window
        self.tokens, self.slots = [], [LOST] * capacity

    def append(self, tokens):
        for token in tokens:
            self.slots[len(self.tokens) % self.capacity] = token
            self.tokens.append(token)

    def truncate(self, length):
        del self.tokens[length:]

    def visible(self, position):
        """The tokens that a query sees, or LOST for those that the ring no longer has."""
        first = max(position - self.window + 1, 0)
        seen = [(self.tokens[p], self.slots[p % self.capacity]) for p in range(first, position + 1)]
        return [token if token is held else LOST for token, held in seen]
