"""GGUF files: what is in one, its tokenizer, and for each architecture the config and weights of mlx-lm's model."""
