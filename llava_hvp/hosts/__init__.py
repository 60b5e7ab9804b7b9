"""The frameworks whose LLaVA can be pruned, a folder each. Importing this imports none of them."""
