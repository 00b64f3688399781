"""Models of the Hugging Face Hub: which files a name stands for, downloads that resume, and what lies here already. Without MLX."""
