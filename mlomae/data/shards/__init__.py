"""WebDataset shards: what they hold, and how it is read."""
