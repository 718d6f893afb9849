"""Measure the page of a large synthetic gallery in headless Chromium."""
