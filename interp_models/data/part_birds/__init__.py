"""Drawn birds with exact masks of their parts."""

from interp_models.data.part_birds.dataset import PartBirds

__all__ = ["PartBirds"]
