"""Shared by several test modules: graphs, networks, data sets, runs; no tests."""
