"""Covering arrays: a few configurations out of many, in which all that is to be met is met together."""

import itertools


def covering(pool, groups):
    """Configurations of a pool that have, among them, every group that any of it has: greedily the one of most new.

    `groups(configuration)` are hashable, such as pairs of values. The same pool gives the same configurations.
    """
    number = {}  # of each group, which is a bit
    bits = [sum({1 << number.setdefault(group, len(number)) for group in groups(one)}) for one in pool]
    left, chosen = (1 << len(number)) - 1, []
    while left:
        best = max(range(len(pool)), key=lambda index: (bits[index] & left).bit_count())
        chosen.append(pool[best])
        left &= ~bits[best]
    return chosen


def pairs(values):
    """Every two of `(name, value)`s, of which there is one a name."""
    return set(itertools.combinations(sorted(values, key=lambda named: named[0]), 2))


def covered(configurations, groups):
    """All groups that some configuration has."""
    return set().union(*map(groups, configurations))
