"""Characters of many scripts, rendered from the DejaVu fonts that matplotlib ships: labelled images without end.

An image is one character in a random face and stroke width, bent by a random affine map and a smooth displacement,
with random contrast and noise. Everything follows from the key. The characters of `TASKS` were chosen so that no two
look alike (cosine of their blurred shapes at most about 0.9, Ogham aside): Greek and Cyrillic share many letters.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

TASKS: dict[str, str] = {
    "arabic": "ءبجخدرسشطعغفقكلمنوىي",
    "armenian": "աբգեէըթժլխծկհղճմնշպջ",
    "cyrillic": "аджйлхцчъыьэюяђѓљњџѣ",
    "georgian": "აბგდვთკლნჟრტფქყცჭჯჰჲ",
    "greek": "αβγδζκλμνξπςτφχωΓΨΞϡ",
    "hebrew": "אבגדהוזטיךכלםעףפץצקר",
    "lao": "ກຂຄງຈຊຍຕຖທນປຜຝພມຣລສຫ",
    "nko": "ߋߍߎߏߐߑߒߓߔߕߖߘߚߜߝߞߟߡߢߤ",
    "syllabics": "ᐂᐕᐢᑃᑙᑴᒄᒞᒺᓐᓟᓯᔁᔘᔦᔵᕅᕗᖁᖠ",
    "tifinagh": "ⴰⴱⴳⴴⴷⴸⴹⴺⴻⴼⴽⴾⴿⵀⵁⵂⵃⵄⵅⵆ",
    "ogham": "ᚁᚂᚃᚄᚅᚆᚇᚈᚉᚊᚋᚌᚍᚎᚏᚑᚒᚓᚔᚕ",
}
PRETRAINING: dict[str, str] = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghkmnpqrtuy"
    "ÀÆÇÈÏÑÒØÙÝÞßàåæèëìíîðñóøùýāĄąĆćĎďĘęĜĝĢĤĥĦĲĶķĸĹĻľŀŁŅņŉŊŋŒœŔŕŖŗŚśŞţŤťūůŲųŴŹźƁƃƄƆƇƈƊƋƌ"
    "ƎƏƑƒƓƔƕƖƛƜƝƠơƢƣƤƥƦƧƩƪƭƮƯƱƲƳƴƷƸƺƻƾƿǁǂǄǆǇǊǌǞǢǣǨǩǪǫǬǭǮǱǶǷǾǿȑșȜȠȡȢȣȤȫȴȵȸȹȺȻȾȿɀɁɂɄɆɇɊɎ",
    "ipa": "ɐɒɕɖɘɚɛɜɝɞɠɢɤɧɨɪɮɯɰɱɲɳɵɷɸɹɻɽɾɿʁʂʃʆʇʉʊʌʍʎʐʑʒʓʔʕʗʚʛʞʠʣʤʦʧʨʩʪʫʬʭʮ",
    "old_italic": "𐌁𐌂𐌃𐌄𐌅𐌇𐌈𐌊𐌋𐌌𐌍𐌎𐌏𐌐𐌑𐌒𐌓𐌔𐌕𐌖𐌘𐌙𐌚𐌜𐌝𐌞",
    "lisu": "ꓒꓕꓘꓙꓞꓤꓨꓵꓶꓷ",
    "latin_extended": "ꜢꜤꜥꜦꜧꜨꜫꜲꜴꜶꜷꜸꜹꜼꜽꜿꝆꝇꝋꝒꝓꞂꞋꞌꞍꞎꞐꞥꞩꞪꟻꟼꟽꟿ",
}
SCRIPTS = TASKS | PRETRAINING

_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
_STROKES = (0, 1, 2)  # extra outline, pixels of the master
_MASTER = 64  # side of a master image, pixels
_EXTENT = 44  # longer side of the character in it, pixels


class Distortion(NamedTuple):
    """Ranges of the random distortion; `render` draws uniformly from them, noise and displacement from normals."""

    rotation: float = 0.26  # radians, either way
    shear: float = 0.25
    scale: tuple[float, float] = (0.7, 1.15)
    shift: float = 0.08  # fraction of the image's side, either way
    bend: float = 0.025  # standard deviation of the smooth displacement, fraction of the side
    contrast: tuple[float, float] = (0.5, 1.0)
    noise: float = 0.2  # largest standard deviation of the pixel noise; the image spans 0 to 1
    shade: float = 0.0  # largest level of a smooth, uneven background, where 1 is the character's own
    invert: bool = False  # dark on light


#: Dark on light, unevenly lit: for streams whose domain is not that of the backbone's pre-training.
SCAN = Distortion(rotation=0.15, shear=0.15, bend=0.015, contrast=(0.7, 1.0), noise=0.1, shade=0.3, invert=True)


def _master(character: str, face: Path, stroke: int) -> np.ndarray | None:
    """The character, centred and scaled to `_EXTENT`, or None where the face lacks it."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(face), 3 * _EXTENT, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character, stroke_width=3 * stroke)
    big = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(big).text((-left, -top), character, fill=255, font=font, stroke_width=3 * stroke)
    box = big.getbbox()
    if box is None:
        return None
    big = big.crop(box)
    factor = _EXTENT / max(big.size)
    small = big.resize((max(1, round(big.width * factor)), max(1, round(big.height * factor))), Image.Resampling.BOX)
    master = Image.new("L", (_MASTER, _MASTER))
    master.paste(small, ((_MASTER - small.width) // 2, (_MASTER - small.height) // 2))
    return np.asarray(master)


@functools.cache
def _coverage(face: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(face)).get_charmap())


def masters(characters: str) -> UInt8[np.ndarray, "characters variants height width"]:
    """Clean 64x64 renderings of each character, white on black, one for every pair of face and stroke width.

    A face that lacks a character is replaced by one that has it, so that every row has the same number of variants.
    """
    import matplotlib

    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    rows = []
    for character in characters:
        faces = [p for p in (fonts / f"{name}.ttf" for name in _FACES) if ord(character) in _coverage(p)]
        if not faces:
            raise ValueError(f"none of matplotlib's DejaVu fonts has the character {character!r}")
        drawn = [_master(character, face, stroke) for face in faces for stroke in _STROKES]
        drawn = [image for image in drawn if image is not None]
        rows.append([drawn[i % len(drawn)] for i in range(len(_FACES) * len(_STROKES))])
    return np.array(rows)


def render(
    key: Key[Array, ""],
    shapes: UInt8[Array, "characters variants height width"],
    labels: Int[Array, " images"],
    size: int = 32,
    distortion: Distortion = Distortion(),
) -> Float[Array, "images size size"]:
    """One random image in [0, 1] of each label's character (a row of `shapes`, from `masters`). Pure; jit it."""
    d = distortion
    keys = iter(jax.random.split(key, 8))
    n = labels.shape[0]

    def uniform(low, high):
        return jax.random.uniform(next(keys), (n,), minval=low, maxval=high)

    variant = jax.random.randint(next(keys), (n,), 0, shapes.shape[1])
    angle, shear = uniform(-d.rotation, d.rotation), uniform(-d.shear, d.shear)
    stretch = jax.random.uniform(next(keys), (2, n), minval=d.scale[0], maxval=d.scale[1])
    shift = jax.random.uniform(next(keys), (2, n, 1, 1), minval=-d.shift, maxval=d.shift)
    coarse = d.bend * jax.random.normal(next(keys), (2, n, 4, 4))
    bend = jax.image.resize(coarse, (2, n, size, size), "cubic")

    line = (jnp.arange(size) + 0.5) / size - 0.5
    y, x = jnp.meshgrid(line, line, indexing="ij")  # output pixel centres, the image spanning -0.5 to 0.5
    cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
    u = (cos * x + sin * y) / stretch[0][:, None, None]
    v = (cos * y - sin * x) / stretch[1][:, None, None]
    u = u + shear[:, None, None] * v
    side = shapes.shape[-1]
    rows = (v + shift[0] + bend[0] + 0.5) * side - 0.5
    columns = (u + shift[1] + bend[1] + 0.5) * side - 0.5

    def sample(label, variant, rows, columns):
        return jax.scipy.ndimage.map_coordinates(
            shapes[label, variant].astype(jnp.float32), [rows, columns], order=1, mode="constant", cval=0.0
        )

    images = jax.vmap(sample)(labels, variant, rows, columns) / 255
    key_level, key_noise, key_shade = jax.random.split(next(keys), 3)
    level = jax.random.uniform(key_level, (2, n, 1, 1))
    contrast = d.contrast[0] + (d.contrast[1] - d.contrast[0]) * level[0]
    noise = d.noise * level[1] * jax.random.normal(key_noise, images.shape)
    corners = d.shade * jax.random.uniform(key_shade, (n, 2, 2))
    shade = jax.image.resize(corners, images.shape, "linear")
    images = jnp.clip(shade + (contrast - shade) * images + noise, 0, 1)
    return 1 - images if d.invert else images


_render = jax.jit(render, static_argnames=("size", "distortion"))


def images(
    key: Key[Array, ""],
    shapes: UInt8[np.ndarray, "characters variants height width"],
    labels: Int[np.ndarray, " images"],
    size: int = 32,
    distortion: Distortion = Distortion(),
    chunk: int = 512,
) -> UInt8[np.ndarray, "images size size 3"]:
    """`render` in pieces of `chunk` images (bounded memory), as grey uint8 images with three equal channels."""
    padded = np.resize(labels, -(-len(labels) // chunk) * chunk)
    pieces = [
        np.asarray(jnp.round(255 * _render(jax.random.fold_in(key, i), shapes, piece, size, distortion)), np.uint8)
        for i, piece in enumerate(padded.reshape(-1, chunk))
    ]
    return np.repeat(np.concatenate(pieces)[: len(labels), ..., None], 3, axis=-1)
