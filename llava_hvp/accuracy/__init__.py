"""What pruning does to the answers of a model that was trained."""
