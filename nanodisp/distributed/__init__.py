"""Ranks, how a model lies on them, and what this machine has."""

from nanodisp.distributed.world import World, start, stop

__all__ = ["World", "start", "stop"]
