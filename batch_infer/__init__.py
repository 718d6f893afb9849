"""Render tables of prompts into images and a results table that accounts for every row."""

__version__ = "0.1.0"
