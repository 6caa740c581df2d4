"""Slow, obvious twins of what `itd` computes fast: dense tensors, loops, sets."""
