"""The counter-based generator: equal to a plain SplitMix64 of the same formula, uniform, independent."""

import math

import pytest
import torch

from ssl_diversity.randomness import bits, mix, mix_int, normal, uniform

MASK = (1 << 64) - 1
N = 1 << 16


def finalise(z: int) -> int:
    """The output function of SplitMix64, as in its reference implementation."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_bits(seed: int, stream: int, position: int, column: int) -> int:
    golden, step = 0x9E3779B97F4A7C15, 0x94D049BB133111EB
    base = finalise((finalise((seed + golden) & MASK) + (stream + 1) * golden) & MASK)
    row = finalise((position * golden + base) & MASK)
    return finalise((row + (column + 1) * step) & MASK)


def test_first_numbers_of_the_published_generator() -> None:
    """SplitMix64 from seed 1234567: https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) & MASK for i in range(3)]
    assert [finalise(state) for state in states] == published
    assert [mix_int(state) for state in states] == published
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    assert [v & MASK for v in mix(signed).tolist()] == published


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 0), (0, 1), (2**63 + 5, 1001), (-1, 7)])
def test_bits_equal_the_plain_formula(seed: int, stream: int) -> None:
    positions = [0, 1, 2, 12345, 2**31, 2**62 + 3]
    ours = bits(seed, stream, torch.tensor(positions), 4)
    assert ours.dtype == torch.int64
    assert [[v & MASK for v in row] for row in ours.tolist()] == [
        [slow_bits(seed, stream, position, column) for column in range(4)] for position in positions
    ]
    u = uniform(seed, stream, torch.tensor(positions), 4)
    assert u.tolist() == [
        [(slow_bits(seed, stream, position, column) >> 40) / 2**24 for column in range(4)]
        for position in positions
    ]


def test_a_number_depends_on_seed_stream_position_and_column_alone() -> None:
    positions = torch.randperm(1000)
    whole = bits(3, 4, positions, 8)
    assert torch.equal(bits(3, 4, positions[100:101], 8), whole[100:101])
    assert torch.equal(bits(3, 4, positions.flip(0), 8), whole.flip(0))
    assert torch.equal(bits(3, 4, positions, 5), whole[:, :5])


def test_values_do_not_collide() -> None:
    values = torch.cat([bits(seed, stream, torch.arange(2000), 20) for seed in (0, 1) for stream in (0, 1)])
    assert len(values.unique()) == values.numel()


def test_uniform_is_uniform() -> None:
    u = uniform(0, 0, torch.arange(N), 16)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 256, 0, 1)
    expected = u.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 330  # chi-square, 255 degrees: 0.1 % beyond 330
    for column in u.T:
        gap = (column.sort().values - torch.linspace(0, 1, N)).abs().max()
        assert gap < 2.2 / math.sqrt(N)  # Kolmogorov-Smirnov: 0.01 % beyond 2.2


def test_every_bit_is_fair() -> None:
    values = bits(0, 0, torch.arange(N), 1)[:, 0]
    ones = (values[:, None] >> torch.arange(64) & 1).double().mean(0)
    assert (ones - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("change", ["seed", "stream", "position", "column"])
def test_neighbours_are_independent(change: str) -> None:
    """Numbers that differ by one step in one key: uncorrelated, and uniform in pairs."""
    positions = torch.arange(N)
    shifts = {"seed": (1, 0, 0), "stream": (0, 1, 0), "position": (0, 0, 1), "column": (0, 0, 0)}
    seed, stream, step = shifts[change]
    a = uniform(5, 5, positions, 2)[:, 0]
    b = uniform(5 + seed, 5 + stream, positions + step, 2)[:, int(change == "column")]
    assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4.5 / math.sqrt(N)
    cells = torch.bincount((a * 16).long() * 16 + (b * 16).long(), minlength=256).float()
    assert ((cells - N / 256) ** 2 / (N / 256)).sum() < 330


def test_flipping_one_bit_of_the_position_flips_half_of_the_bits() -> None:
    positions = torch.arange(512)
    for bit in range(0, 63, 7):
        changed = bits(0, 0, positions, 1) ^ bits(0, 0, positions ^ (1 << bit), 1)
        share = (changed >> torch.arange(64) & 1).double().mean()
        assert abs(float(share) - 0.5) < 0.02


def test_normal_is_standard_normal() -> None:
    x = normal(0, 0, torch.arange(N), 2)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    cdf = 0.5 * (1 + torch.erf(x.double().flatten().sort().values / math.sqrt(2)))
    assert (cdf - torch.linspace(0, 1, x.numel(), dtype=torch.float64)).abs().max() < 2.2 / math.sqrt(
        x.numel()
    )
    assert torch.corrcoef(x.T)[0, 1].abs() < 4.5 / math.sqrt(N)
