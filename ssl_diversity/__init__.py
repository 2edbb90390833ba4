"""Self-supervised pretraining-diversity experiments under a fixed compute budget."""

__version__ = "0.1.0"
