"""Ranks, collectives and the two engines that step a level: plain torch and DeepSpeed."""
