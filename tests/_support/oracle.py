"""Attention by its definition, in NumPy float64 and plain loops: what attnlib is measured against.

Nothing here is shared with attnlib, and nothing is vectorised over positions: one query vector meets one key
vector at a time, so that an error in folding, broadcasting or masking cannot occur on both sides.
Words and layouts: docs/concepts/shapes-and-axes.md. Masks of positions follow at the end, one function for each
definition.
"""

import itertools
import math

import numpy as np


def attention(
    query,
    key,
    value,
    *,
    score=None,
    attention_axes=None,
    mask=None,
    bias=None,
    logits_soft_cap=None,
    score_mod=None,
    is_causal=False,
    normalize=True,
    keep=None,
    dropout_rate=0.0,
):
    """Return ``(output, weights, lse)``, all float64.

    ``query (*batch and attention axes, N, D)``, ``key (..., K, D)``, ``value (..., K, E)``; batch axes may be 1.
    ``output (*query's axes, N, E)``, ``weights (*batch, N, *query axes, *key axes)``, ``lse (*batch, N, *query axes)``.

    ``score``: a function of a query vector, a key vector and the number of the query head; by default the product over
    ``D**0.5``. ``score_mod``: a function as attnlib takes it. ``keep`` has the shape of the weights: True where dropout
    keeps an entry. ``normalize``: False leaves weights exp(logit).
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    attended = _attended_axes(query.ndim, attention_axes)
    batch_axes = [axis for axis in range(query.ndim - 2) if axis not in attended]
    batch = tuple(max_or_zero(x.shape[axis] for x in (query, key, value)) for axis in batch_axes)
    query_axes = tuple(query.shape[axis] for axis in attended)
    key_axes = tuple(key.shape[axis] for axis in attended)
    heads, kv_heads = query.shape[-2], key.shape[-2]

    weights_shape = (*batch, heads, *query_axes, *key_axes)
    mask = _broadcast_to_weights(True if mask is None else mask, weights_shape, len(attended)).astype(bool)
    bias = _broadcast_to_weights(0.0 if bias is None else bias, weights_shape, len(attended)).astype(np.float64)
    keep = np.ones(weights_shape, bool) if keep is None else np.broadcast_to(keep, weights_shape)

    output_axes = list(query.shape[:-2])
    for axis, size in zip(batch_axes, batch, strict=True):
        output_axes[axis] = size
    output = np.zeros((*output_axes, heads, value.shape[-1]))
    weights = np.zeros(weights_shape)
    lse = np.full((*batch, heads, *query_axes), -np.inf)

    for b, n, t in itertools.product(np.ndindex(*batch), range(heads), np.ndindex(*query_axes)):
        kv_head = n // (heads // kv_heads)
        logits = {}  # by key position, and only of the positions that this row may attend
        for s in np.ndindex(*key_axes):
            if not mask[(*b, n, *t, *s)] or (is_causal and _flat(s, key_axes) > _flat(t, query_axes)):
                continue
            q = _vector(query, batch_axes, b, attended, t, n)
            k = _vector(key, batch_axes, b, attended, s, kv_head)
            logit = (_scaled_dot if score is None else score)(q, k, n) + bias[(*b, n, *t, *s)]
            if logits_soft_cap is not None:
                logit = logits_soft_cap * math.tanh(logit / logits_soft_cap)
            if score_mod is not None:
                logit = float(score_mod(logit, _alone(b), n, _alone(t), _alone(s)))
            logits[s] = logit

        largest = max(logits.values(), default=-math.inf)
        if largest == -math.inf:
            continue  # nothing to attend: zeros, and lse -inf
        total = sum(math.exp(logit - largest) for logit in logits.values())
        lse[(*b, n, *t)] = largest + math.log(total)
        result = np.zeros(value.shape[-1])
        for s, logit in logits.items():
            w = math.exp(logit - largest) / total if normalize else math.exp(logit)
            w *= float(keep[(*b, n, *t, *s)]) / (1.0 - dropout_rate)
            weights[(*b, n, *t, *s)] = w
            result += w * _vector(value, batch_axes, b, attended, s, kv_head)
        place = _place(output.ndim, batch_axes, b, attended, t, n)
        output[place] = result
    return output, weights, lse


def max_or_zero(sizes):
    """The size that a batch axis broadcasts to: 0 where any is 0, else the largest."""
    sizes = list(sizes)
    return 0 if 0 in sizes else max(sizes)


def _attended_axes(rank, attention_axes):
    if attention_axes is None:
        return (0,) if rank == 3 else tuple(range(1, rank - 2))
    return tuple(axis % rank for axis in attention_axes)


def _broadcast_to_weights(array, weights_shape, attended):
    array = np.asarray(array)
    if array.ndim != len(weights_shape) and array.ndim > 2 * attended:
        raise ValueError(f"rank {array.ndim} is neither that of the weights {weights_shape} nor at most {2 * attended}")
    return np.broadcast_to(array, weights_shape)


def _place(rank, batch_axes, b, attended, position, head):
    """The index of one vector in an operand's own layout."""
    place = [None] * (rank - 2) + [head]
    for axis, index in zip([*batch_axes, *attended], [*b, *position], strict=True):
        place[axis] = index
    return tuple(place)


def _vector(array, batch_axes, b, attended, position, head):
    own = tuple(0 if array.shape[axis] == 1 else index for axis, index in zip(batch_axes, b, strict=True))
    return array[_place(array.ndim, batch_axes, own, attended, position, head)]


def _flat(position, sizes):
    index = 0
    for p, size in zip(position, sizes, strict=True):
        index = index * size + p
    return index


def _scaled_dot(q, k, head):
    return sum(float(a) * float(b) for a, b in zip(q, k, strict=True)) / max(len(q), 1) ** 0.5


def _alone(index):
    """An index along one axis is a number."""
    return index[0] if len(index) == 1 else index


# Masks, by positions.  True means attend.  Sizes of several attention axes come as tuples; the result has the axes
# (*query axes, *key axes), with (batch, 1) in front where the definition depends on the batch.


def causal(query_axes, key_axes, offset=0, axis=None):
    """``key <= query + offset``: in row-major order, or along one of the attention axes."""
    query_axes, key_axes = _sizes(query_axes), _sizes(key_axes)

    def attend(t, s):
        if axis is not None:
            return s[axis] <= t[axis] + offset
        return _flat(s, key_axes) <= _flat(t, query_axes) + offset

    return _every_pair(query_axes, key_axes, attend)


def sliding_window(query_axes, key_axes, left=None, right=None):
    """``query - left <= key <= query + right`` on row-major positions; None is no limit."""
    query_axes, key_axes = _sizes(query_axes), _sizes(key_axes)

    def attend(t, s):
        distance = _flat(s, key_axes) - _flat(t, query_axes)
        return (left is None or distance >= -left) and (right is None or distance <= right)

    return _every_pair(query_axes, key_axes, attend)


def prefix(query_axes, key_axes, length):
    """``key < length`` on row-major positions."""
    key_axes = _sizes(key_axes)
    return _every_pair(query_axes, key_axes, lambda t, s: _flat(s, key_axes) < length)


def padding(query_real, key_real):
    """``(batch, 1, T, S)`` from ``(batch, T)`` and ``(batch, S)``: both positions are real."""
    batch = len(query_real)
    return _every_batch(
        batch, len(query_real[0]), len(key_real[0]), lambda b, t, s: bool(query_real[b][t] and key_real[b][s])
    )


def lengths(query_length, key_length, query_size, key_size):
    """``(batch, 1, T, S)``: positions below the batch entry's length are real; None is no limit."""
    batch = len(query_length if query_length is not None else key_length)

    def attend(b, t, s):
        real_query = query_length is None or t < query_length[b]
        return real_query and (key_length is None or s < key_length[b])

    return _every_batch(batch, query_size, key_size, attend)


def segments(query_ids, key_ids=None, padding_id=None):
    """``(batch, 1, T, S)``: equal ids attend; padding neither attends nor is attended."""
    key_ids = query_ids if key_ids is None else key_ids

    def attend(b, t, s):
        return query_ids[b][t] == key_ids[b][s] and (padding_id is None or query_ids[b][t] != padding_id)

    return _every_batch(len(query_ids), len(query_ids[0]), len(key_ids[0]), attend)


def neighborhood(query_axes, key_axes, size, dilation=1, border="shift", stride=1):
    """The ``size`` nearest keys on each axis, among those a multiple of ``dilation`` away from the query.

    The window holds ``size // 2`` keys to the left of the query.  At a border it is shifted inward, so that it always
    holds ``size`` keys (all of them where there are fewer), or clipped.  ``stride`` consecutive queries of one residue
    have the window of the one in their middle, or of the last key where the middle is beyond it and the query is not.
    """
    query_axes, key_axes = _sizes(query_axes), _sizes(key_axes)
    size, dilation, border, stride = (
        x if isinstance(x, tuple) else (x,) * len(key_axes) for x in (size, dilation, border, stride)
    )

    def window(position, length, width, step, border, together):
        same = [s for s in range(length) if s % step == position % step]
        place = position // step  # places count the keys of one residue
        middle = [p for p in range(place + together) if p // together == place // together][together // 2 :][:1]
        (leader,) = middle or [place]
        leader = min(leader, max(place, len(same) - 1))
        start = leader - width // 2
        if border == "clip":
            return set(same[max(start, 0) : max(start + width, 0)])
        start = max(0, min(start, len(same) - width))
        return set(same[start : start + width])

    def attend(t, s):
        rules = zip(t, s, key_axes, size, dilation, border, stride, strict=True)
        return all(key in window(at, *rule) for at, key, *rule in rules)

    return _every_pair(query_axes, key_axes, attend)


def _sizes(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _every_pair(query_axes, key_axes, attend):
    query_axes, key_axes = _sizes(query_axes), _sizes(key_axes)
    result = np.zeros((*query_axes, *key_axes), bool)
    for t in np.ndindex(*query_axes):
        for s in np.ndindex(*key_axes):
            result[(*t, *s)] = attend(t, s)
    return result


def _every_batch(batch, query_size, key_size, attend):
    result = np.zeros((batch, 1, query_size, key_size), bool)
    for b, t, s in itertools.product(range(batch), range(query_size), range(key_size)):
        result[b, 0, t, s] = attend(b, t, s)
    return result
