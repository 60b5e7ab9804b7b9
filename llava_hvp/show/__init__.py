"""Pictures of what pruning keeps. Importing this package imports neither PIL nor any host."""
