"""Map parameter names: two-way tables between ours and a foreign format's, prefixes, wrappers."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor


class NameTable:
    """Pairs of patterns (ours, theirs). `*` matches one part of a dotted name, `**` one or more parts.

    The n-th wildcard of one side fills the n-th of the other. Names that match no pair stay unchanged.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._forth = [(_expression(a), _template(b)) for a, b in pairs]
        self._back = [(_expression(b), _template(a)) for a, b in pairs]

    def theirs(self, name: str) -> str:
        return _apply(self._forth, name)

    def ours(self, name: str) -> str:
        return _apply(self._back, name)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of DistributedDataParallel and torch.compile, at any depth of a name."""
    return {re.sub(r"\b(module|_orig_mod)\.", "", str(name)): value for name, value in state.items()}


def _apply(rules: list[tuple[re.Pattern[str], str]], name: str) -> str:
    for expression, template in rules:
        if match := expression.fullmatch(name):
            return match.expand(template)
    return name


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)"))


def _template(pattern: str) -> str:
    parts = re.split(r"\*\*|\*", pattern)
    return parts[0] + "".join(rf"\g<{n}>{part}" for n, part in enumerate(parts[1:], 1))
