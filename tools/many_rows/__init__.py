"""Measure commands on an OUT with many rows."""
