"""Operations with custom derivative rules, which support every transformation of JAX."""
