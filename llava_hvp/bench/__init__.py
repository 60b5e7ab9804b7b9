"""What pruning costs and saves."""
