"""The explorer: one page on which embeddings are seen to condense, and to disperse."""
