"""What a person reads, before the work, about a photo that the hypernetwork does not know."""

from __future__ import annotations

from typer import echo

from hyperdreambooth.base.load import EMBEDDED_NAME
from hyperdreambooth.faces.dataset import Photos
from hyperdreambooth.personalize import Personalizer

_DRAWS = "this base draws avatars; a photographic result takes --base and --hypernet, see docs/training.md"


def report_distance(personalizer: Personalizer, photos: Photos, drawn: bool = False) -> float | None:
    """Prints what `distance_words` says of photos, and returns the distance for the report."""
    distance, words = distance_words(personalizer, photos, drawn)
    if words:
        echo(words)
    return distance


def distance_words(
    personalizer: Personalizer, photos: Photos, drawn: bool = False
) -> tuple[float | None, str]:
    """Returns how far photos are from the training's, and a line about it, which may be empty.

    On the avatars' base there is a line for every photo, except for `drawn` ones, which the command made.
    """
    distance = personalizer.distance(photos)
    strange = distance is not None and distance > 1
    lines = list[str]()
    if strange:
        lines.append(
            f"the photo is unlike those of the hypernetwork's training ({distance:.2f}, the limit is 1)"
        )
    if personalizer.base.source == EMBEDDED_NAME and not drawn:
        lines.append(_DRAWS)
    elif strange:
        lines.append("expect a poor likeness, or use a hypernetwork that was trained on such photos")
    return distance, "; ".join(lines)
