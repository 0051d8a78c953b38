"""ToMoE (arXiv:2501.15316): learned masks, routers and attention pruning."""
