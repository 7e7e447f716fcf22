"""Test support that plug-ins can use too: the shared list of cases, and comparisons with derived error bounds."""
