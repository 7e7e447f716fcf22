"""What every training run by transformers' Trainer shares: options, counters, log, checkpoints, updates, processes."""
