"""Hugging Face in and out, and the one place where a model is opened by name."""
