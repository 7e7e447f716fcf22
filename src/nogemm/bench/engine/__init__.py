"""What every benchmark runs on: processes, rounds, pools of tokens, checks against the reference."""
