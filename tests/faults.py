"""Small faults for mutations.py: each leaves a program that runs and gives wrong results."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of the library, which some test must notice.

    Attributes:
      name: what is wrong.
      old: a text that is in the library exactly once, in whichever file.
      new: what to write instead.
      tests: those expected to notice, the cheapest first: the name of a file of tests, then a space and what is chosen
        in it (as for pytest -k: words of names of tests, joined by `and`, `or`, `not`), or nothing for all.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    # the tiled engine
    Fault(
        "backward-delta",  # the backward pass drops delta
        "logits_ct = weights * (tile.drop(weights_ct) + rows_delta[..., None])",
        "logits_ct = weights * tile.drop(weights_ct)",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "whole-rows-delta",  # where a tile has all keys, delta is not divided by the sum of the weights
        "rows_ct, rows_delta = rows_ct / row_sum[..., None], rows_delta / row_sum",
        "rows_ct = rows_ct / row_sum[..., None]",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "whole-rows-nan",  # there a row of NaN reaches the values that it does not attend
        "jnp.where(jnp.isnan(row_sum), 1, row_sum)",
        "row_sum",
        ("test_contract.py masked_content and dense-dense-dot",),
    ),
    Fault(
        "exp-underflow",  # the exponential of what is masked is tiny and not 0
        "return [jnp.where(x >= _LEAST, result, jnp.where(jnp.isnan(x), x, 0))]",
        "return [jnp.where(jnp.isnan(x), x, result)]",
        ("test_exponential.py ends",),
    ),
    Fault(
        "exp-log-2",  # log(2) has one part
        "rest = (clamped - n * _LOG_2[0]) - n * _LOG_2[1]",
        "rest = clamped - n * np.float32(0.6931472)",
        ("test_exponential.py error",),
    ),
    Fault(
        "tangent-of-lse",  # the tangent of the output forgets that of the lse
        "return [weighted_dot - output * lse_dot[..., None], lse_dot]",
        "return [weighted_dot, lse_dot]",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "running-maximum",  # the sum so far keeps the old maximum
        "old.output * rescale[..., None] + sums",
        "old.output + sums",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "bfloat16-sum",  # the sum of a row is rounded to bfloat16
        "tile.split_rows(jnp.sum(weights, -1), -1)",
        "tile.split_rows(jnp.sum(weights, -1), -1).astype(jnp.bfloat16).astype(old.row_sum.dtype)",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "half-softmax",  # softmax is computed in the dtype of the operands
        "return jax.dtypes.canonicalize_dtype(jnp.float64) if wide else jnp.float32",
        "return jax.dtypes.canonicalize_dtype(jnp.float64) if wide else jnp.result_type(*arrays)",
        ("test_contract.py test_3_statistics and reference",),
    ),
    Fault(
        "lse-maximum",  # the lse lacks the maximum
        "jnp.log(row_sum) + state.row_max",
        "jnp.log(row_sum)",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "empty-row-nan",  # a row that attends nothing is NaN
        "return jnp.where(row_max == -jnp.inf, 0, row_max)",
        "return row_max",
        ("test_contract.py rows_that_attend_nothing and blockwise-bias-dot",),
    ),
    Fault(
        "swap-k-and-g",  # heads take turns among key heads
        "query=query.reshape(*query.shape[:-3], kv_heads, heads // kv_heads, *query.shape[-2:]),",
        "query=jnp.swapaxes(query.reshape(*query.shape[:-3], heads // kv_heads, kv_heads, *query.shape[-2:]), -3, -4),",
        ("test_laws.py one_head_at_a_time and reference",),
    ),
    Fault(
        "mask-of-other-head",  # a mask or bias a head goes to other heads
        "*batch, *groups, *array.shape[-2:])",
        "*batch, *groups[::-1], *array.shape[-2:]).swapaxes(-3, -4)",
        ("test_second_opinions.py with_bias and [shape0]",),
    ),
    Fault(
        "side-by-side-head",  # heads side by side all take what is of the first
        "blocks[..., head, :, :, head, :]",
        "blocks[..., head, :, :, 0, :]",
        ("test_cases.py values and [grouped]",),
    ),
    Fault(
        "in-turn-mask",  # heads in turn take the mask of other heads
        "block, index * heads, size * heads, axis",
        "block, index, size * heads, axis",
        ("test_cases.py values and grouped and mask and head]",),
    ),
    Fault(
        "heads-of-a-tile",  # tiles with several heads overlap
        "np.argwhere(np.ones(self.heads[:-1] // at_once)) * at_once",
        "np.argwhere(np.ones(self.heads[:-1] // at_once))",
        ("test_long_tiles.py heads",),
    ),
    Fault(
        "index-of-all-tiles",  # an index that differs from the third tile on is taken for one of all tiles
        "(rows != rows[0]).any(0)",
        "(rows[:2] != rows[0]).any(0)",
        ("test_long_tiles.py values",),
    ),
    Fault(
        "bias-gradient-last-tile",  # the gradient of a bias is that of its last tile
        "return self.put(total, self.cut(total, axes) + part, axes)",
        "return self.put(total, part if axes == (-2, -1) else self.cut(total, axes) + part, axes)",
        ("test_cases.py values and [multi-query]",),
    ),
    Fault(
        "unbroadcast-mean",  # the gradient of what broadcasts is a mean
        "return jnp.sum(x, [axis for axis, ",
        "return jnp.mean(x, [axis for axis, ",
        ("test_cases.py values and batch and one and broadcasts]",),
    ),
    Fault(
        "cap-under-mask",  # the soft cap does not know the mask
        "logits = jnp.where(self.mask, logits, 0)  # a masked",
        "pass  # a masked",
        ("test_contract.py test_2_masked_bias and [blockwise-2.0",),
    ),
    Fault(
        "nan-forward",  # masked values that are NaN stay
        "jnp.where(f, x, 1) for",
        "x for",
        ("test_contract.py test_2_masked_content and [blockwise-dense-dot",),
    ),
    Fault(
        "nan-backward",  # the cotangent of a row of NaN stays
        "output_ct = jnp.where(jnp.isnan(lse)[..., None], 0, output_ct)",
        "pass",
        ("test_contract.py test_2_masked_content and [blockwise-dense-dot",),
    ),
    Fault(
        "nan-backward-reference",  # the reference passes the cotangent of a row of NaN on
        "output = nan_where(jnp.isnan(lse)[..., None], output)",
        "pass",
        ("test_contract.py test_2_masked_content and [reference-dense-dot",),
    ),
    Fault(
        "softmax-derivative",  # the reference has a softmax whose derivative is not centred
        "weights_dot = weights * (tangents[0] - mean[..., None])",
        "weights_dot = weights * tangents[0]",
        ("test_cases.py values and [dot]",),
    ),
    Fault(
        "second-order-residuals",  # the second derivative ignores what a linear map depends on
        "perturbed = [n for n in range(count)",
        "perturbed = [n for n in range(0)",
        ("test_cases.py second and [dot]",),
    ),
    Fault(
        "second-order-sign",  # the transpose of a product has the wrong sign
        "lambda form, ct, weights: pt_o_product(",
        "lambda form, ct, weights: -pt_o_product(",
        ("test_cases.py second and [dot]",),
    ),
    Fault(
        "key-spans",  # the last tile of a window leaves the keys
        "first_key = np.minimum(spans[:, 0], key.length - keys)",
        "first_key = spans[:, 0]",
        ("test_long_tiles.py window",),
    ),
    Fault(
        "pairs-by-keys",  # a product with pairs stored by keys has another sign
        "return [_swap(jax.lax.optimization_barrier(output))]",
        "return [_swap(jax.lax.optimization_barrier(-output))]",
        ("test_linear_transpose.py factor",),
    ),
    # scores
    Fault(
        "additive-sign",  # the derivative of an additive score has the wrong sign
        "slope = r * r - r",
        "slope = r - r * r",
        ("test_cases.py values and additive and feature]",),
    ),
    Fault(
        "additive-second-order",  # the second derivative of an additive score has a wrong term
        "result[power] += 2 * (-c - c * power)",
        "result[power] += 2 * (-c + c * power)",
        ("test_additive.py sums_of_every_order and default",),
    ),
    Fault(
        "additive-large",  # an additive score is off for large operands
        "size = math.exp(64)",
        "size = math.exp(32)",
        ("test_additive.py exact_at_every_size and 45",),
    ),
    Fault(
        "score-scale",  # the logits are not scaled
        "return self._scaled(query), key, InnerProduct()",
        "return query, key, InnerProduct()",
        ("test_cases.py values and [dot]",),
    ),
    # weights that are not divided, and learned memory
    Fault(
        "masked-weight-of-infinity",  # a masked weight is NaN where exp(lse) overflows
        "jnp.where(weights == 0, 0, weights * factors)",
        "weights * factors",
        ("test_activations.py overflow",),
    ),
    Fault(
        "unnormalized-output",  # weights are not divided by their sum, but those of the output are
        "return AttentionResult(output * factors, lse, exponentials)",
        "return AttentionResult(output, lse, exponentials)",
        ("test_activations.py definition",),
    ),
    Fault(
        "bias-of-a-part",  # inside shard_map, the default bias counts the keys of one device
        "return math.prod(shapes.key) * (devices if manual else 1)",
        "return math.prod(shapes.key)",
        ("test_context.py sigmoid",),
    ),
    Fault(
        "relu-of-nan",  # a logit of NaN has no weight
        "zero = logit <= math.sqrt(self.power * float(jnp.finfo(logit.dtype).tiny))",
        "zero = ~(logit > math.sqrt(self.power * float(jnp.finfo(logit.dtype).tiny)))",
        ("test_activations.py log_relu",),
    ),
    Fault(
        "relu-second-derivative",  # it is infinite at a tiny logit
        "zero = logit <= math.sqrt(self.power * float(jnp.finfo(logit.dtype).tiny))",
        "zero = logit <= 0",
        ("test_activations.py log_relu",),
    ),
    Fault(
        "sigmoid-at-zero",  # the second derivative is 0 at a logit of 0
        "jnp.where(negative, x, 0) - jnp.log1p(jnp.exp(jnp.where(negative, x, -x)))",
        "jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))",
        ("test_activations.py log_sigmoid",),
    ),
    Fault(
        "memory-share",  # the weights of memory and of keys add up to 2
        "each * jnp.exp(part - lse)[..., None]",
        "each",
        ("test_learned_memory.py more_keys",),
    ),
    Fault(
        "memory-dropout",  # the weights of memory are dropped where those of the first keys are
        'shared["dropout_rng"] = jax.random.fold_in(options["dropout_rng"], 1)',
        'shared["dropout_rng"] = options["dropout_rng"]',
        ("test_learned_memory.py dropped",),
    ),
    # modifiers and sinks
    Fault(
        "alibi-sign",  # ALiBi favours what is far
        "return logit - _entry(self.slopes, head, logit) * distance",
        "return logit + _entry(self.slopes, head, logit) * distance",
        ("test_modifiers.py schemes and [alibi-all]",),
    ),
    Fault(
        "bucket-edge",  # a bucket of distances begins one late
        "sum((distance >= bound).astype(jnp.int32) for bound in bounds)",
        "sum((distance > bound).astype(jnp.int32) for bound in bounds)",
        ("test_modifiers.py buckets_are_those",),
    ),
    Fault(
        "relative-bias-mirrored",  # a relative bias is mirrored
        "jnp.clip(q - k + size // 2, 0, size - 1)",
        "jnp.clip(k - q + size // 2, 0, size - 1)",
        ("test_modifiers.py swin and reference",),
    ),
    Fault(
        "modifier-head",  # a modifier is told other heads
        "head = jnp.arange(heads[-2] * heads[-1], dtype=jnp.int32).reshape(*heads[-2:], 1, 1)",
        "head = jnp.arange(heads[-2] * heads[-1], dtype=jnp.int32).reshape(*heads[:-3:-1], 1, 1).swapaxes(0, 1)",
        ("test_laws.py option_of_a_head and reference",),
    ),
    Fault(
        "lse-without-sink",  # the lse lacks the sink
        "output * attended, joined_lse,",
        "output * attended, lse,",
        ("test_modifiers.py sink_is_a_key and [reference-0.0]",),
    ),
    Fault(
        "merge-without-maximum",  # parts are merged without a maximum
        "row_max = jax.lax.stop_gradient(finite_row_max(lses))",
        "row_max = jnp.zeros_like(lses[..., 0])",
        ("test_laws.py shift_of_all_lses",),
    ),
    # masks
    Fault(
        "causal-offset",  # the offset of Causal has the wrong sign
        "saturating_add(query_index, expand_per_batch(self.offset))",
        "saturating_add(query_index, -expand_per_batch(self.offset))",
        ("test_masks.py definition_over_one_axis and causal",),
    ),
    Fault(
        "causal-tile",  # Causal calls tiles full that are not
        "full=key_last <= query_first + self.offset)",
        "full=key_last <= query_last + self.offset)",
        ("test_tiles.py exact and Causal",),
    ),
    Fault(
        "window-off-by-one",  # SlidingWindow sees one key less
        "key.position >= query.position - self.left",
        "key.position > query.position - self.left",
        ("test_masks.py definition_over_one_axis and window",),
    ),
    Fault(
        "window-tile",  # SlidingWindow skips a tile that it touches
        "empty = empty | (key.last < query.first - self.left)",
        "empty = empty | (key.last <= query.first - self.left)",
        ("test_tiles.py exact and SlidingWindow",),
    ),
    Fault(
        "lengths-off-by-one",  # Lengths and Prefix see one position of the padding
        "    return position < end\n",
        "    return position <= end\n",
        ("test_masks.py definition_over_one_axis and lengths",),
    ),
    Fault(
        "segments-padding",  # Segments ignores padding
        "return same if self.padding_id is None else same & (query_ids != as_at_least_int32(self.padding_id))",
        "return same",
        ("test_masks.py definition_over_one_axis and segments",),
    ),
    Fault(
        "not-tile",  # Not has the tiles of what it inverts
        "FULL - self.mask.classify_tiles(query, key)",
        "self.mask.classify_tiles(query, key)",
        ("test_tiles.py exact and Not",),
    ),
    Fault(
        "dilated-tile",  # Dilated skips a tile that it touches
        "none = farthest // step * step < nearest",
        "none = farthest // step * step <= nearest",
        ("test_tiles.py exact and Dilated",),
    ),
    Fault(
        "block-sparse-last",  # BlockSparse skips its last block
        "(np.minimum(start, count), np.minimum(stop, count))",
        "(np.minimum(start, count), np.minimum(stop, count - 1))",
        ("test_tiles.py exact and BlockSparse",),
    ),
    Fault(
        "neighborhood-border",  # Neighborhood does not shift at the far border
        "numpy.maximum(numpy.minimum(first, group - self.size), 0)",
        "numpy.maximum(first, 0)",
        ("test_masks.py natten",),
    ),
    Fault(
        "neighborhood-stride",  # queries of a stride share the window of an earlier query
        "self.stride + self.stride // 2",
        "self.stride + self.stride // 3",
        ("test_sparse_shapes.py stride_is_that_of_natten",),
    ),
    Fault(
        "registers-tiles",  # a tile with one register is taken to be full
        "kinds = np.where(side.last < count, FULL, kinds)",
        "kinds = np.where(side.first < count, FULL, kinds)",
        ("test_registers.py grid_follows",),
    ),
    Fault(
        "positions-padding",  # padding among explicit positions attends
        "(query.position >= 0) & (key.position >= 0)",
        "(query.position >= 0) & (key.position >= -1)",
        ("test_modifiers.py positions_place and reference",),
    ),
    Fault(
        "attention-axes-order",  # the order of attention axes is ignored
        "attended = tuple(axis % rank for axis in attended)",
        "attended = tuple(sorted(axis % rank for axis in attended))",
        ("test_laws.py folding_is_flattening and reference",),
    ),
    # dropout
    Fault(
        "dropout-local",  # dropout goes by the place in the tile
        "self.query_positions.array_index, self.key_positions.array_index",
        "self.query_positions.array_index - self.query_positions.start, self.key_positions.array_index",
        ("test_dropout.py same_entries and blockwise",),
    ),
    Fault(
        "dropout-scale",  # what dropout keeps is not scaled up
        "weights / (1 - self.plan.dropout_rate)",
        "weights",
        ("test_dropout.py axes_are_folded and blockwise",),
    ),
    Fault(
        "dropout-hash",  # a multiplier of the hash loses half of the bits
        "* np.uint32(0x7FEB352D)",
        "* np.uint32(0x7FEB0000)",
        ("test_dropout.py neighbours or corners or alike",),
    ),
    Fault(
        "dropout-mixing",  # rows and columns meet in an exclusive or alone
        "_hash32(row ^ column) < threshold",
        "row ^ column < threshold",
        ("test_dropout.py corners",),
    ),
    Fault(
        "dropout-heads",  # all heads drop the same
        "stride *= shape[axis]",
        "stride *= 0",
        ("test_dropout.py neighbours or corners or alike",),
    ),
    # positions and caches
    Fault(
        "rotary-sign",  # rotary embedding turns the other way
        "return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)",
        "return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1)",
        ("test_positions.py complex and default-False",),
    ),
    Fault(
        "decode-position",  # decode places tokens one late
        "query_positions = new_positions(self.length, num_valid, num_new)",
        "query_positions = new_positions(self.length + 1, num_valid, num_new)",
        ("test_cache.py one_by_one",),
    ),
    Fault(
        "ring-slot",  # a ring writes to the next slot
        "start = length if cache.window is None else length % capacity",
        "start = length if cache.window is None else (length + 1) % capacity",
        ("test_cache.py one_by_one",),
    ),
    Fault(
        "truncate-overflow",  # tokens that others have overwritten become valid again
        "(cache.length > cache.capacity) & (lengths > 0)",
        "(cache.length > cache.capacity) & (lengths > cache.capacity)",
        ("test_cache_edits.py beyond_the_capacity_stay",),
    ),
    Fault(
        "ring-truncate-twice",  # a ring forgets what an earlier truncation lost
        "jnp.maximum(0 if cache.num_lost is None else cache.num_lost, cache.length - cache.capacity)",
        "cache.length - cache.capacity",
        ("test_cache_edits.py as_far_as_it_has",),
    ),
    Fault(
        "ring-truncate-again",  # tokens that are written again stay lost
        "num_lost = jnp.clip(num_lost, 0, length)",
        "num_lost = jnp.maximum(num_lost, 0)",
        ("test_cache_edits.py as_far_as_it_has",),
    ),
    Fault(
        "page-not-copied",  # a sequence writes to a page that it shares
        "copies = ((num_holders > 1) &",
        "copies = ((num_holders > 2) &",
        ("test_paged_cache.py any_edits",),
    ),
    Fault(
        "page-copied-by-all",  # no writer keeps a shared page, so that more pages are needed
        "& ~((num_writers == num_holders) & (first == index))",
        "",
        ("test_paged_cache.py first_of_two_writers",),
    ),
    Fault(
        "page-kept",  # a sequence without pages keeps its last one, where tokens are missing
        "length // page_size * page_size, length)",
        "length, length)",
        ("test_paged_cache.py any_edits",),
    ),
    Fault(
        "page-taken",  # a sequence that is spoilt takes pages
        "(wanted <= num_columns) & ~is_spoilt(",
        "(wanted <= num_columns) | is_spoilt(",
        ("test_paged_cache.py any_edits",),
    ),
    Fault(
        "page-leak",  # truncation keeps one page too many
        "columns < _pages_for(length, page_size)[:, None]",
        "columns <= _pages_for(length, page_size)[:, None]",
        ("test_paged_cache.py any_edits",),
    ),
    Fault(
        "nnx-draws",  # NNX draws the norms after the output projection
        '"value", "query_norm", "key_norm", "out"',
        '"value", "out", "query_norm", "key_norm"',
        ("test_nnx.py seeds_give",),
    ),
    Fault(
        "cache-window",  # the window of a cache sees one more token
        "window = SlidingWindow(self.window - 1, None)",
        "window = SlidingWindow(self.window, None)",
        ("test_cache.py any_split_is_the_whole and dot-ring",),
    ),
    Fault(
        "int8-scale",  # the scale of int8 is one step too small
        "scale = jnp.max(jnp.abs(array), -1, keepdims=True, initial=0.0) / 127",
        "scale = jnp.max(jnp.abs(array), -1, keepdims=True, initial=0.0) / 128",
        ("test_cache_programs.py int8_stores and 1.0",),
    ),
    # layers
    Fault(
        "decode-mask",  # decoding ignores the mask
        '{**options, "is_causal": True}',
        '{**options, "is_causal": True, "mask": None}',
        ("test_decode.py mask_speaks_of_slots",),
    ),
    Fault(
        "key-mask",  # a layer ignores key_mask
        'masks.append(KeyPadding(_padding(key_mask, "key_mask", axes, key_shape)))',
        "pass",
        ("test_layers.py masks_combine or padding_may_hold",),
    ),
    Fault(
        "gate",  # the gate of a layer is left out
        'attended = attended * activations["gate"]',
        "pass",
        ("test_layers.py the_layer_is_its_parts",),
    ),
    Fault(
        "use-scale",  # a learned scale is left out
        "return Dot(scale)",
        "return Dot()",
        ("test_layer_options.py gradients_reach or begin_as",),
    ),
    Fault(
        "output-bias",  # the output projection has no bias
        'if "bias" not in affine:\n        return output\n',
        'if "bias" not in affine or num_axes > 1:\n        return output\n',
        ("test_layers.py the_layer_is_its_parts",),
    ),
    Fault(
        "norm-mean",  # the norm of query and key is not centred
        "wide = wide - jnp.mean(wide, -1, keepdims=True)",
        "pass",
        ("test_layer_options.py norms_are_those_of_flax and layer]",),
    ),
    Fault(
        "bias-regularizer",  # the regulariser of biases is dropped
        'terms += [(self.bias_regularizer, p["bias"]) for p in params.values() if "bias" in p]',
        "pass",
        ("test_regularization.py pure_penalty",),
    ),
    # converters
    Fault(
        "torch-kernel",  # kernels of PyTorch have heads and features swapped
        "return matrix.reshape(heads, -1, matrix.shape[1]).transpose(2, 0, 1)",
        "return matrix.reshape(-1, heads, matrix.shape[1]).transpose(2, 1, 0)",
        ("test_convert_torch.py torch_layout",),
    ),
    Fault(
        "torch-output",  # the output kernel of PyTorch is not transposed
        "return matrix.transpose().reshape(heads, -1, matrix.shape[0])",
        "return matrix.reshape(heads, -1, matrix.shape[0])",
        ("test_convert_torch.py there_and_back", "test_convert.py equinox"),
    ),
    Fault(
        "keras-swap",  # key and value of Keras are swapped
        'return to_jax(unflatten(_rename(entries, OUT, "out")))',
        'made = to_jax(unflatten(_rename(entries, OUT, "out")))\n'
        '        return made | {"key": made["value"], "value": made["key"]}',
        ("test_convert.py keras_multi_head and bias]",),
    ),
    Fault(
        "interleaved-swap",  # key and value of an interleaved layer are swapped
        "groups[:, -2], groups[:, -1]]",
        "groups[:, -1], groups[:, -2]]",
        ("test_convert_torch.py fused_layout and 2-True",),
    ),
    # looking inside
    Fault(
        "top-keys",  # top_keys names the key before
        "return largest, jnp.where(largest == 0, -1, keys)",
        "return largest, jnp.where(largest == 0, -1, keys - 1)",
        ("test_inspect.py read_off and [dot-blockwise]",),
    ),
    Fault(
        "entropy-sink",  # the entropy forgets the weight of the sink
        "weight += jnp.exp(sink - total)",
        "pass",
        ("test_inspect.py read_off and [sink-blockwise]",),
    ),
    Fault(
        "explain-memory",  # explain estimates no memory for tiles
        "problem.value.size + 2 * pairs",
        "problem.value.size + 0 * pairs",
        ("test_memory.py explain_estimates and tile",),
    ),
    Fault(
        "explain-flops",  # explain counts half of a product
        "return 2 * outputs * math.prod(",
        "return outputs * math.prod(",
        ("test_cost.py count_of_a_function",),
    ),
    # masks of functions
    Fault(
        "function-full-tiles",  # a tile is full if one head attends all of its pairs
        "jnp.all(block | ~inside, lead)",
        "jnp.any(block | ~inside, lead)",
        ("test_mask_functions.py tables_of_pairs",),
    ),
    Fault(
        "function-batch-axis",  # the sizes of the batch axes are those of other axes
        "shape = [size if is_read and n == axis else 1 for n in range(rank)]",
        "shape = [size if is_read and n == min(axis, rank - 3) - (axis == 0) else 1 for n in range(rank)]",
        ("test_mask_functions.py array_has_heads",),
    ),
    Fault(
        "function-heads-of-a-device",  # where devices exchange heads, a function sees the numbers of the first ones
        "isinstance(mask, (Predicate, TracedFunction))",
        "isinstance(mask, Predicate)",
        ("test_context.py first_order and function and heads",),
    ),
    # keys in chunks
    Fault(
        "chunks-in-use",  # the first chunks are read, not those that attend
        "chunks = jnp.argsort(~used)",
        "chunks = jnp.arange(used.size)",
        ("test_decode_chunks.py not_read",),
    ),
    Fault(
        "chunks-of-a-batch",  # under vmap only chunks that all entries attend are read
        "used = ~_in_whole_batch(~jnp.any(attends.reshape(-1, chunk), -1))",
        "used = _in_whole_batch(jnp.any(attends.reshape(-1, chunk), -1))",
        ("test_decode_chunks.py vmap",),
    ),
    Fault(
        "joined-sums",  # the sum of a later chunk has another maximum
        "state.row_sum * scale + other.row_sum * other_scale",
        "state.row_sum * scale + other.row_sum",
        ("test_decode_chunks.py not_read",),
    ),
    # inside shard_map
    Fault(
        "sum-over-shards",  # what a key receives is added up over the devices
        "ones = cast_to_varying(ones, shard_axes)",
        "pass",
        ("test_sharded_functions.py inspect and shard_map",),
    ),
    Fault(
        "cotangents-of-shards",  # the cotangent of a parameter that devices share is the sum over them in each tile
        "args = cast_to_common_axes(args)  # here",
        "pass  # here",
        ("test_sharded_functions.py captures and blockwise and shard_map",),
    ),
    Fault(
        "cudnn-last-key",  # cuDNN's rows do not see NaN in the last key
        "attended = count[..., jnp.minimum(query + 1, keys)]",
        "attended = count[..., jnp.minimum(query, keys)]",
        ("test_cudnn.py masked_cannot_matter",),
    ),
]

assert len({fault.name for fault in FAULTS}) == len(FAULTS), "two faults share a name"
