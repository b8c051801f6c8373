"""Images, the three disjoint sets, and one resumable stream of batches per level."""

from mlomae.data.loader import Batch, LevelLoaders, Stream

__all__ = ["Batch", "LevelLoaders", "Stream"]
