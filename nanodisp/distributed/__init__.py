"""Ranks, the layout of a model on them, and the hardware."""

from nanodisp.distributed.world import World, start, stop

__all__ = ["World", "start", "stop"]
