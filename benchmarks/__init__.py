"""Measurements, each a script of its own that prints a table; a test borrows from one."""
