"""Q/DQ pairs: where they go, how they are inserted, cleaned up and computed exactly."""
