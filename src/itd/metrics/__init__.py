"""Pure functions of tensors and counts: rates with intervals, detection, distribution, alignment, reconstruction."""
