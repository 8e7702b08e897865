"""Loaded engines at work: predict, evaluate, draw and write."""
