"""Read models, tokenizers and texts from the disk, and run encoders over texts."""
