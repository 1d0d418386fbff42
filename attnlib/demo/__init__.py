"""Two tasks that train a small model with attention: ``python -m attnlib.demo [dates|digits]``.

`dates` translates dates in 42 languages into ISO 8601 with additive attention. `digits` classifies handwritten digits
with attention along columns, rows and both. Each task trains in about a minute on two CPU cores, prints its accuracy on
held-out examples, and saves a picture of the attention weights. Extra packages: ``pip install "attnlib[demo]"``.
"""
