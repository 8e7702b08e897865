"""What a file holds, and what this machine can do."""
