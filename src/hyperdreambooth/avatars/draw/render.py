"""The renderer: draws an identity in a context, with the same bytes every time."""

import math

from PIL import Image, ImageDraw

from hyperdreambooth.avatars.draw import clothes, face, hair
from hyperdreambooth.avatars.draw.pen import Pen
from hyperdreambooth.avatars.draw.people import Context, Identity
from hyperdreambooth.avatars.draw.scenery import scenery
from hyperdreambooth.avatars.draw.shape import FaceShape
from hyperdreambooth.avatars.draw.skew import EVEN, Skew
from hyperdreambooth.avatars.draw.styles import stylise

SIZE = 128
_SUPER = 3
# The head fills the frame because a small model learns features of a few pixels last.
_CLOSE_UP, _LOWER = 1.15, 3.0


def draw(identity: Identity, context: Context, size: int = SIZE, skew: Skew = EVEN) -> Image.Image:
    """Draws a person in a context, with an even face; returns an RGB picture of `size` pixels a side."""
    large = scenery(context.background, context.scene, size * _SUPER)
    measures = FaceShape(identity, context, skew)
    body, head = _pens(large, context)
    clothes.shirt(body, context.shirt)
    hair.back_hair(head, measures)  # over the shirt, behind the neck
    face.neck(body, measures)
    clothes.neckwear(body, measures, context.neckwear)
    _draw_head(head, measures, context)
    picture = large.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return stylise(picture, context.style, context.light)


def _pens(large: Image.Image, context: Context) -> tuple[Pen, Pen]:
    """Returns a pen for the body, which only moves, and one for the head, which tilts and turns too."""
    unit = large.width / 128.0
    canvas = ImageDraw.Draw(large, "RGBA")
    origin = ((64.0 + context.shift_x) * unit, (64.0 + _LOWER + context.shift_y) * unit)
    zoom = unit * context.scale * _CLOSE_UP
    body = Pen(canvas, zoom, origin)
    return body, Pen(canvas, zoom, origin, math.radians(context.tilt), context.turn)


def _draw_head(pen: Pen, s: FaceShape, context: Context) -> None:
    """Draws the head, from the ears forward."""
    for part in (face.ears, face.head, face.cheeks, face.beard, face.nose, face.mouth, face.eyes, face.brows):
        part(pen, s)
    hair.front_hair(pen, s)
    clothes.earrings(pen, s)
    eyewear = clothes.sunglasses if context.eyewear == "sunglasses" else clothes.glasses
    eyewear(pen, s)
    clothes.headwear(pen, s, context.headwear)
