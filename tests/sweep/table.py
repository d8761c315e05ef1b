"""docs/families.md, made from the sweep's result alone."""

from __future__ import annotations

from typing import Any

RESULTS = "docs/results/families.json"
DOCUMENT = "docs/families.md"

_HEAD = """\
# Supported families

Made by `make families` from [{results}]({link}); do not edit. {passed} of {total} pass, with transformers \
{transformers}: every family that uses its experts interface, those with an adapter, and models with images or sound \
around one of them, of which the text path is proven.

Each family is a tiny random checkpoint as hub repositories have them, converted, loaded with the fewest experts in \
memory that a plan allows, and compared with transformers' own implementation, by the Auto class named:

- *fp32 records*: largest relative difference of a token's logits, a prompt and then single tokens with a cache; 0 is \
bit-identical. The greedy text is the same too.
- *INT4 kernel*: INT4 records against transformers on the same weights dequantized, median token.
- *INT4*: INT4 records and 8-bit dense weights (what `fate convert` makes) against the checkpoint, median token; \
random models amplify rounding far more than trained ones. With all experts in memory the bits are the same.
- *recall*: of the cross-layer gate on this random model, share of the experts needed that were its first choices. \
Trained models are foretold far better; a dash: its router cannot be asked.
- *native*: what of a layer a decoded token computes by native calls. *layer*: attention and routing in one, experts \
and sum in another; *block*: attention stays the family's module; *experts*: so does the block around them.
- *activation*: what the expert kernel computes between an expert's matrices, found out by trial; *its own code*: the \
module's, around packed linears, which is slower.

| family | Auto class | layers | fp32 records | INT4 kernel | INT4 | recall | native | activation | notes |
|---|---|---|---|---|---|---|---|---|---|
"""


def render(result: dict[str, Any]) -> str:
    """The document of a result as `sweep.__main__` writes it."""
    families = result["families"]
    passed = [family for family in families if not family["reason"]]
    head = _HEAD.format(
        results=RESULTS.removeprefix("docs/"),
        link=RESULTS.removeprefix("docs/"),
        passed=len(passed),
        total=len(families),
        transformers=result["transformers"],
    )
    lines = [_row(family) for family in families]
    failed = [f"- {family['family']}: {family['reason']}" for family in families if family["reason"]]
    tail = ["", "Not passing:", "", *failed] if failed else []
    return head + "\n".join([*lines, *tail]) + "\n"


def _row(family: dict[str, Any]) -> str:
    name = family["family"]
    if family["model_type"] != name:
        name += f" (`{family['model_type']}`)"
    cells = [
        name,
        family["auto"].removeprefix("AutoModelFor"),
        str(family["layers"]),
        _small(family["raw_error"]),
        _percent(family["packed_error"]),
        _percent(family["int4_error"]),
        _percent(family["recall"], 0),
        family["native"] or "–",
        "; ".join(family["activations"]),
        "; ".join(family["notes"]) if not family["reason"] else "**fails**",
    ]
    return f"| {' | '.join(cells)} |"


def _small(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"
