"""Operations with derivative rules of their own, which every transformation of JAX understands."""
