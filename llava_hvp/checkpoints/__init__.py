"""Checkpoints opened, asked, looked into, measured; models of a published shape."""
