"""From text to batches: tokenizers, documents, shards, corpora, batches, questions."""
