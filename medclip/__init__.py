"""Take a CLIP into a medical domain, and show with honest numbers what was gained and what was lost."""

__version__ = "0.1.0"
