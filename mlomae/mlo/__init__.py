"""Mathematics of the hypergradient: plain functions of tensors and callables, no models, no engines."""
