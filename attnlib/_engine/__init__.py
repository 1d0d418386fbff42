"""How attention is computed: the implementations, and which of them computes a problem."""
