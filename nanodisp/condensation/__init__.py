"""Measuring embedding condensation: hidden states in, numbers and pictures out."""
