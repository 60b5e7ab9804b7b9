"""Which options and how few tokens: by how far pruning moves the unpruned model's own answers."""
