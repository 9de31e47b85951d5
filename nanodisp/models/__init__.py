"""The models: a decoder, its key-value cache and output head, generation and scoring."""
