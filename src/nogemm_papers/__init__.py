"""What reproduces figures of the papers, for `nogemm bench` and `nogemm profile` in a checkout; no wheel has it."""
