"""Result files as tables and pages."""
