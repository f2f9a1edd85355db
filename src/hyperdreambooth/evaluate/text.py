"""The prompt score: the share of what a prompt asks for that is in the picture (docs/concepts.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor


def asked(prompt: str, phrases: Mapping[str, str]) -> list[str]:
    """Finds the labels (`hat:red`) whose phrase (`wearing a red hat`) is in a prompt, in the prompt's order.

    A phrase is whole words. Of two that overlap the longer one counts: "a red hat with a feather" does not
    ask for "a red hat" as well.
    """
    found: list[tuple[int, int, str]] = []
    for label, phrase in sorted(phrases.items(), key=lambda item: (-len(item[1]), item[0])):
        pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)"
        for match in re.finditer(pattern, prompt, flags=re.IGNORECASE) if phrase else ():
            if all(match.end() <= start or match.start() >= end for start, end, _ in found):
                found.append((match.start(), match.end(), label))
    return list(dict.fromkeys(label for _, _, label in sorted(found)))


def groups(labels: Sequence[str]) -> dict[str, list[int]]:
    """Returns group → the columns of its values, of labels written `group:value`."""
    columns: dict[str, list[int]] = {}
    for column, label in enumerate(labels):
        columns.setdefault(label.split(":", 1)[0], []).append(column)
    return columns


def found_share(logits: Tensor, labels: Sequence[str], wanted: Sequence[str]) -> float | None:
    """Computes the share of the wanted labels that the reader finds in one picture; None if none is wanted.

    Args:
        logits: `(l,)` of one picture.
        labels: the name of each column, `group:value`; the largest logit of a group is its value.
        wanted: the labels that the prompt asks for.
    """
    if not wanted:
        return None
    found = {labels[own[int(logits[own].argmax())]] for own in groups(labels).values()}
    return sum(label in found for label in wanted) / len(wanted)
