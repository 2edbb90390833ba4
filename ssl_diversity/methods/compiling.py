"""torch.compile for a method's networks, where there is a compiler that works."""

from functools import cache

import torch
from torch import nn

from ssl_diversity.methods.base import Method


def compile_networks(module: Method, device: str, threads: int) -> str:
    """Have the backbone and its teachers compiled at their first batch; "", or why they stay as they are.

    Shapes are fixed: one compilation for each size of view. Parameters and state dicts keep their names.
    """
    from torch._inductor import config

    config.compile_threads = threads  # no more processes than the task may use
    if why := _broken(device):
        return why
    networks = [
        module.backbone,
        *(teacher for _, teacher in module.followers if type(teacher) is type(module.backbone)),
    ]
    for network in networks:
        network.compile(dynamic=False)
    return ""


@cache
def _broken(device: str) -> str:
    """What keeps torch from compiling anything for a device, if anything does."""
    try:
        torch.compile(nn.functional.gelu)(torch.ones(64, device=device))
    except Exception as error:  # of any of its parts: no compiler, no headers, no room for its files
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""
