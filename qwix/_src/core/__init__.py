"""Quantized arrays and the ops on them: pure functions, no Flax."""
