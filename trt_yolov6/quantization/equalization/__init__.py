"""Scales of channels moved between layers, so that each tensor needs one range."""
