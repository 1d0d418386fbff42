"""What an implementation of attention is, for those who bring one: pass it as `implementation=`.

`docs/extending/implementation.md` has a worked example.
"""

from attnlib._core.problem import AttentionProblem, AttentionResult, Estimate, Implementation

__all__ = ["AttentionProblem", "AttentionResult", "Estimate", "Implementation"]
