"""Measurements of what the project promises in numbers: `python -m bench [NAME…]`, one file a subject."""
