"""Benchmarks over LLaVA's own eval scripts and scorers, and the papers' tables beside them."""
