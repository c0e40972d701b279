"""Stain colours of histology: how they are estimated, carried from slide to slide, and jittered. One method a file."""
