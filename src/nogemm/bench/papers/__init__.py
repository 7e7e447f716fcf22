"""What reproduces the papers' figures; nothing else needs it."""
