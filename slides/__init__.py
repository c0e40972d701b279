"""Whole-slide layer: numpy, openslide and tifffile; no torch, no hydra, and never an import of `medclip`."""
