"""Images, the three disjoint sets, and one resumable stream of batches per level."""
