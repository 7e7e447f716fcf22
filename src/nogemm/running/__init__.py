"""What long commands share: progress, and results that outlive an interruption."""
