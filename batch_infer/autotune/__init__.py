"""Autotune."""
