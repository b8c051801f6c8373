"""``mlomae shards``: makes WebDataset shards, indexes them, and looks at them."""
