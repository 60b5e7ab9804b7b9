"""How scores are seen: the vision encoder, its attention, and the prompt's relevance."""
