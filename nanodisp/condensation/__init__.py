"""Embedding condensation, measured: from hidden states to numbers and figures."""
