"""Where pruning plugs into transformers' own LLaVA classes. `llava` is never imported here."""
