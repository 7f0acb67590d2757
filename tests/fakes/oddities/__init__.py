"""Certificate chains in every odd shape, in families: what a CA may send, or an operator pin, good or not.

An oddity stands once as the trust anchor, once as the intermediate and once as the leaf of a chain that is good but
for it; some also as a spare anchor beside a good one. The rest are whole chains.
"""

from collections.abc import Callable, Iterator

from fakes.judge import Case
from fakes.oddities import anchors, extensions, fields, limits, texts

FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    *(texts.strings, texts.names, texts.spellings),
    *(fields.times, fields.versions, fields.serial_numbers, fields.algorithms, fields.keys, fields.encodings),
    *(extensions.extensions, extensions.usages, extensions.alternative_names),
    *(limits.host_constraints, limits.name_constraints, limits.certificate_policies, limits.path_lengths),
    *(anchors.identifiers, anchors.namesakes, anchors.intermediates, anchors.cross_signed, anchors.self_issued),
)


def every_case() -> list[Case]:
    """All of them; their labels are unique."""
    found = [each for family in FAMILIES for each in family()]
    labels = [each.label for each in found]
    assert len(set(labels)) == len(labels), {label for label in labels if labels.count(label) > 1}
    return found
