"""A carving as an ordinary Hugging Face folder: Mixtral, Qwen2-MoE or Qwen3-MoE."""
