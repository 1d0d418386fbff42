"""Attention layers as pure functions over explicit parameters: projections around attention.

Parameters are plain nested dicts of arrays, the same tree that the linen modules declare:

    query | key | value   kernel (C, N, D), bias (N, D)      N heads; key and value have K heads, value E features
    out                   kernel (N, E, *O), bias (*O)
    gate                  kernel (C, N, E), bias (N, E)      with use_gate
    score                 scale (N, D) or (N,)               with score="additive"; with use_scale
    query_norm | key_norm scale (D,)                         with normalize_qk
    sink                  logit (N,)                         with use_sink
    memory                key (M, K, D), value (M, K, E)     with num_memory
"""

from attnlib.layers._multi_head import init_multi_head_attention, multi_head_attention

__all__ = ["init_multi_head_attention", "multi_head_attention"]
