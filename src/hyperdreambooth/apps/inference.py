"""Commands that use a trained hypernetwork or an adapter: demo, predict, personalize, generate."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option, echo

from hyperdreambooth.apps import checks
from hyperdreambooth.apps.checks import Check
from hyperdreambooth.apps.options import (
    PROMPT_HELP,
    Cluster,
    HypernetName,
    Photos,
    ShardOf,
    SomePhotos,
    Weights,
    by_method,
    command,
    named_path,
    one_way,
)
from hyperdreambooth.files import InputError

if TYPE_CHECKING:
    from PIL import Image

    from hyperdreambooth.apps.person_config import PersonalizeConfig
    from hyperdreambooth.apps.settings import GenerateConfig, Job, NoConfig

REGION_HELP = "left,top,right,bottom from 0 to 1: draw each adapter's person there; one for each adapter."
OTHERS = 6  # more photos of a drawn person, for scores only


@command("hyperdreambooth.apps.person_config:PersonalizeConfig", "seed", adjust=by_method)
def demo(
    job: Job[PersonalizeConfig],
    photo: Annotated[
        Path | None,
        Option(help="Your own photo [one of a held-out avatar].", parser=named_path),
        Check(checks.person),
    ] = None,
    out: Annotated[Path, Option(help="The folder for all results."), Check(checks.output_folder)] = Path(
        "demo"
    ),
    hypernet: HypernetName = None,
) -> None:
    """Run the whole method on a drawn avatar, offline.

    From a photo to a prediction, to a finetuned LoRA, to one picture that shows all stages.
    """
    from hyperdreambooth.apps.personalization import run_personalization
    from hyperdreambooth.faces.dataset import read_person

    with tempfile.TemporaryDirectory() as folder:
        reference, others = (photo, []) if photo else held_out(job.own.seed, Path(folder))
        run_personalization(job, read_person(reference), others, out, hypernet)


def held_out(seed: int, folder: Path) -> tuple[Path, list[Image.Image]]:
    """Draws a test avatar: the reference photo, a file in the folder, and more photos of the same avatar.

    The reference photo gets a caption, as a user would write one: what a caption names (a smile, a beach) is
    not learned as a part of the person.
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


@command("hyperdreambooth.apps.settings:NoConfig", adjust=one_way)
def predict(
    job: Job[NoConfig],
    photos: SomePhotos,
    out: Annotated[
        Path,
        Option(help="The adapter to write (.safetensors), or a folder for many people."),
        Check(checks.file_or_folder),
    ],
    form: Annotated[
        Literal["diffusers", "kohya", "lidb"], Option("--format", help="The form of the adapter.")
    ] = "lidb",
    hypernet: HypernetName = None,
    cluster: Cluster = None,
    shard: ShardOf = None,
) -> None:
    """Predict an adapter from photos, without training.

    For a folder with one sub-folder a person, OUT is a folder that gets an adapter for each.
    """
    many = checks.are_people(photos)
    (checks.output_folder if many else checks.output_file)(out)
    if not many and (cluster or shard):
        raise InputError("PHOTOS: --cluster and --shard take a folder with one sub-folder a person")
    if many:
        from hyperdreambooth.apps.predictions import predict_people

        echo(predict_people(job, photos[0], out, form, hypernet, cluster, shard))
        return
    from hyperdreambooth.apps.familiarity import report_distance
    from hyperdreambooth.apps.loading import load_personalizer
    from hyperdreambooth.faces.dataset import read_person

    person = read_person(photos)
    with job.stage("load"):
        personalizer = load_personalizer(job.base, hypernet)
    with job.stage("predict"):
        distance = report_distance(personalizer, person)
        adapter = personalizer.predict(person)
    adapter.save(out, form)
    entries = {"rank": adapter.rank, "trigger": adapter.trigger, "distance": distance}
    job.report(out, photos=[str(photo) for photo in photos], **entries)
    echo(str(out))


@command(
    "hyperdreambooth.apps.person_config:PersonalizeConfig",
    "prompts", "method|person", "rank", "steps|auto", "seed", adjust=by_method,
)  # fmt: skip
def personalize(
    job: Job[PersonalizeConfig],
    photos: Photos,
    out: Annotated[
        Path, Option(help="The folder for adapters, pictures and report.json."), Check(checks.output_folder)
    ],
    hypernet: HypernetName = None,
) -> None:
    """Make a LoRA of a person from photos.

    Predicts, raises the rank and finetunes, then generates pictures of every stage and scores them. The same
    command goes on from what an interrupted one has kept. --method lora and lidb need no hypernetwork.
    """
    from hyperdreambooth.apps.personalization import run_personalization
    from hyperdreambooth.faces.dataset import read_person

    run_personalization(job, read_person(photos), [], out, hypernet)


@command("hyperdreambooth.apps.settings:GenerateConfig", "seed")
def generate(
    job: Job[GenerateConfig],
    prompt: Annotated[list[str], Option(help=PROMPT_HELP)],
    out: Annotated[Path, Option(help="The folder for the images."), checks.result_of("generate")],
    adapter: Annotated[
        list[Path] | None, Option(help="An adapter file; may be repeated."), Check(checks.adapters)
    ] = None,
    weight: Weights = None,
    region: Annotated[list[str] | None, Option(help=REGION_HELP)] = None,
    hypernet: HypernetName = None,
) -> None:
    """Generate images from prompts, with or without adapters.

    Several adapters work together, for example a person and a style. Two people need a --region each:
    otherwise their faces are blended into one.
    """
    from hyperdreambooth.apps.loading import load, open_all, open_sum
    from hyperdreambooth.apps.together import BLENDED, draw_regions, regions_of
    from hyperdreambooth.files import whole_file
    from hyperdreambooth.generate import generate_images
    from hyperdreambooth.progress import Progress

    own = job.own
    regions = regions_of(region or [], adapter or [])
    names = [f"{at:03d}-{k}.png" for at in range(len(prompt)) for k in range(own.images)]
    with job.stage("load"):
        base = load(job.base)
        given = (adapter or [], weight or [], base, hypernet)
        each = open_all(*given) if regions else []
        worn = None if regions else open_sum(*given)
    if worn is not None and worn.trigger and worn.trigger in worn.other_triggers:
        warnings.warn(BLENDED, stacklevel=2)
    with job.stage("generate"), Progress("generate", len(names)) as bar:

        def save(at: int, picture: Image.Image) -> None:
            with whole_file(out / names[at]) as part:
                picture.save(part, format="PNG")
            bar.update(1)

        if regions:
            draw_regions(base, prompt, list(zip(each, regions, strict=True)), own, save)
        else:
            generate_images(base, prompt, worn, drawn=save, **own.model_dump())
    job.report(out, prompts=prompt, files=names, adapters=[str(file) for file in adapter or []])
    echo(f"{out}: {len(names)} image{'s'[: len(names) != 1]}")
