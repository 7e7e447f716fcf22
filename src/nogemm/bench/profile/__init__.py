"""Where a layer's time goes, and what it makes the machine do."""
