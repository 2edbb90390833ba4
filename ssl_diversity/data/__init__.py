"""Pools: prepared once, read in any exact order. Nothing in this package imports torch."""
