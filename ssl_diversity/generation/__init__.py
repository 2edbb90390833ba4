"""A source that is made: a diffusion model trained on a pool, and a pool sampled from it. No torch here."""
