"""Export to and import from Hugging Face, and the one place where a model is opened by name."""
