"""Studies: the same comparison over several arms, seeds and budgets, run, collected and told."""
