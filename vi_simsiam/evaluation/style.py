"""Common style of the figures: colours, type and grid; how a figure is created and written.

A figure is drawn within `matplotlib.rc_context(STYLE)` and shown at half its size: 200 dots an
inch, type of 7 to 9 points.
"""

from __future__ import annotations

import functools
import io
import math
import unicodedata
import warnings
from pathlib import Path
from typing import Any

from matplotlib import get_data_path
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image

from vi_simsiam.data_names import data_label
from vi_simsiam.errors import ImageWarning
from vi_simsiam.files import write_atomically
from vi_simsiam.paths import printable
from vi_simsiam.text import one_line

BLUE, ORANGE, GRAY, INK = "#2f6db3", "#e07b39", "#8a8f98", "#24292f"
_DPI = 200
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "text.color": INK,
    "text.parse_math": False,  # names of data sets may hold dollars
    "axes.edgecolor": "#c6cbd1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.handlelength": 1.4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def figure(title: str, size: tuple[float, float] = (8.0, 3.4)) -> Figure:
    """An empty figure with a heading, `size` inches; 1600 x 680 pixels by default."""
    drawn = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(title, x=0.01, ha="left", fontsize=8.5, color="#57606a")
    return drawn


def save(figure: Figure, path: Path, colours: int | None = None) -> Path:
    """Write a figure as PNG, atomically; `colours` of a palette keep photographs small."""
    _spell(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")
    if colours is not None:
        image = image.quantize(colours, method=Image.Quantize.MEDIANCUT)
    write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))
    return path


def _spell(figure: Figure) -> None:
    """Change text with control characters, or characters that the font lacks, drawn as boxes.

    The latter gets another font, or another spelling where no font has them.
    """
    own = _characters(findfont(STYLE["font.family"]))
    for text in figure.findobj(Text):
        text.set_text("\n".join(map(one_line, text.get_text().split("\n"))))
        content = text.get_text()
        missing = {character for character in content if ord(character) not in own} - {"\n"}
        if not missing:
            continue
        if (other := _font_with(frozenset(missing))) is not None:
            text.set_fontfamily([STYLE["font.family"], other])
        else:
            spelt = {ord(character): _spelt(character) for character in missing}
            text.set_text(content.translate(spelt))


@functools.cache
def _font_with(characters: frozenset[str]) -> str | None:
    """A font of the system that has these characters; a warning if there is none."""
    for font in fontManager.ttflist:
        # Matplotlib's own fonts are for formulas, or draw every character as a box.
        if not font.fname.startswith(get_data_path()) and all(
            ord(each) in _characters(font.fname) for each in characters
        ):
            return font.name
    warnings.warn(
        "figures: no font here has all characters of the names; some are spelt otherwise. A font "
        "such as Noto Sans CJK has more",
        ImageWarning,
        stacklevel=2,
    )
    return None


@functools.cache
def _characters(file: str) -> set[int]:
    """The characters that a font file has; none where it cannot be read."""
    try:
        return set(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return set()


def _spelt(character: str) -> str:
    """The letter without its marks, if it is one, else its number."""
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or character.encode("ascii", "backslashreplace").decode()


def shown(data: str) -> str:
    """The name of a data set in figures: the last part of a folder's or a packed file's path."""
    return printable(data_label(data).partition(":")[2] or data)


def number(value: float, spread: float) -> str:
    """A value with enough decimals to differ from others within `spread`; at least one digit."""
    decimals = min(max(2 - math.floor(math.log10(spread)), 0), 8) if spread > 0 else 3
    vanishes = value != 0 and abs(value) < 0.5 * 10**-decimals
    return f"{value:.1g}" if vanishes else f"{value:,.{decimals}f}"
