"""What several test modules share: graphs, networks, data sets, runs; no tests."""
