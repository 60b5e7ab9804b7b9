"""Inside a language model: what a method drops between decoder layers. Knows torch and no host."""
