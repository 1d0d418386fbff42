"""What every other part of the package speaks: axes, positions, problems, pytrees, checks and errors."""
