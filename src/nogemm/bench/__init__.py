"""Measure: quality of a converted model, and speed of layers and models beside their dense peers."""
