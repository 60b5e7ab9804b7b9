"""How the shipped checkpoints were trained; not part of the wheel."""
