"""A stock LLaVA process made to prune: what the startup hook switches on."""
