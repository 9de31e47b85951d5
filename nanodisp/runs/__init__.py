"""A run's folder: what is written there, and how it is read back; docs/formats.md describes it."""
