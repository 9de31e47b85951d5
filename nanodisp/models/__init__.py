"""The models: a decoder, its cache, its output head, and what one does with a trained one."""
