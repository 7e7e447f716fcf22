"""`./run demo`: the whole chain on a real sentence encoder, from the dense checkpoint to the report.

Steps are in `chain.py`, what runs in a fresh process in `child.py`, the closing table in `table.py`.
"""
