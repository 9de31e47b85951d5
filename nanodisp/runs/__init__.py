"""A run's folder: what is written to it, and how it is read back. docs/formats.md describes the formats."""
