"""Images, the three disjoint sets, and one resumable stream of batches per level."""

from mlomae.data.batches import Batch
from mlomae.data.loader import LevelLoaders
from mlomae.data.stream import Stream

__all__ = ["Batch", "LevelLoaders", "Stream"]
