"""ToMoE (arXiv:2501.15316): experts, routers and attention masks learned by a hypernetwork over frozen weights."""
