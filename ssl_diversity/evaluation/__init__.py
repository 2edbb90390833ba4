"""Evaluation: linear, kNN and few-shot probes on frozen features. Imports no torch before a probe runs."""

from ssl_diversity.evaluation.config import ProbeSettings, ProbeSpec, parse_probe
from ssl_diversity.evaluation.task import probe

__all__ = ["ProbeSettings", "ProbeSpec", "parse_probe", "probe"]
