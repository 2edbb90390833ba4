"""Sweeps: a grid of cells, planned into tasks, run by workers, kept in a store."""
