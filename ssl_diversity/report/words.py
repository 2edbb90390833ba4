"""Numbers as people read them."""

import time


def amount(budget: str) -> str:
    """A budget as it was asked for; plain numbers with their thousands apart."""
    return f"{int(budget):,}" if budget.isdecimal() else budget


def scientific(value: float) -> str:
    """`9.7 × 10¹⁴`."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def short(n: float) -> str:
    """`1,024`, `50k`, `1.28M`: at most three digits and a unit from ten thousand on."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if n >= max(size, 1e4):
            return f"{n / size:.3g}{unit}"
    return f"{n:,.0f}"


def date(seconds: float) -> str:
    """`2026-11-24 07:10 UTC` of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
