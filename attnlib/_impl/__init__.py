"""Implementations of a Problem; they share no code but the rooms below them, and never import each other."""
