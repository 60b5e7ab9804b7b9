"""Qwen2.5-VL: a windowed tower, 2 x 2 patches a token, and positions of three axes."""
