"""Model repositories for servers."""
