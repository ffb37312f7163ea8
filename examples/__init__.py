"""Runnable examples; each says at its top how to start it."""
