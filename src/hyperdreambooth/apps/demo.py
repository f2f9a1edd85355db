"""`hdb demo`: the whole method on the embedded avatars, for a person that no training has seen."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from hyperdreambooth.apps.options import HypernetName, as_recommended, command, named_path
from hyperdreambooth.apps.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

    from hyperdreambooth.apps.personalization import PersonalizeConfig

OTHERS = 6  # more photos of the person, for scores only


@command("hyperdreambooth.apps.personalization:PersonalizeConfig", "seed", adjust=as_recommended)
def demo(
    settings: Settings[PersonalizeConfig],
    photo: Annotated[
        Path | None, Option(help="Your own photo [one of a held-out avatar].", parser=named_path)
    ] = None,
    out: Annotated[Path, Option(help="The folder for all results.")] = Path("demo"),
    hypernet: HypernetName = None,
) -> None:
    """Run the whole method on a drawn avatar, offline.

    From a photo to a prediction, to a finetuned LoRA, to one picture that shows all stages.
    """
    from hyperdreambooth.apps.personalization import run_personalization
    from hyperdreambooth.faces.dataset import read_person

    if photo is not None:
        run_personalization(settings, read_person(photo), [], out, hypernet)
        return
    with tempfile.TemporaryDirectory() as folder:
        reference, others = held_out(settings.own.seed, Path(folder))
        run_personalization(settings, read_person(reference), others, out, hypernet)


def held_out(seed: int, folder: Path) -> tuple[Path, list[Image.Image]]:
    """Draws a test avatar.

    The reference photo gets a caption, as a user would write one: what a caption names (a smile, a beach) is
    not learned as a part of the person.

    Returns:
        The reference photo, a file in `folder`, and more photos of the same avatar.

    Raises:
        InputError: there is no test avatar of that number.
    """
    from hyperdreambooth.avatars.draw.people import SPLITS
    from hyperdreambooth.avatars.folder import photo
    from hyperdreambooth.files import InputError

    if not 0 <= seed < len(SPLITS["test"]):
        raise InputError(f"seed: expected 0 to {len(SPLITS['test']) - 1}, got {seed}")
    person = SPLITS["test"].start + seed
    reference = folder / f"avatar-{person}.png"
    image, caption = photo(person, 0)
    image.save(reference)
    reference.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return reference, [photo(person, number)[0] for number in range(1, OTHERS + 1)]
