"""Ranks, the layout of a model on them, and the hardware."""

from nanodisp.distributed.world import World, group_of_ranks, of_torchrun, rank_lost, start

__all__ = ["World", "group_of_ranks", "of_torchrun", "rank_lost", "start"]
