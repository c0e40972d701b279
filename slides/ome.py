"""What OME-XML says of a slide. Nothing outside the file is ever followed, and no entity is expanded."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from slides.errors import SlideError

_MAX = 16 << 20
# OME's units of length in µm; the default is µm.
_UNITS = {"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6}


def ome_properties(name: str, xml: str) -> dict[str, str]:
    """PhysicalSizeX and Y in µm of the first image, and the objective's magnification, as `ome.*` properties.

    Raises:
        SlideError: it is no XML, too long, or declares entities.
    """
    if len(xml) > _MAX or re.search(r"<!\s*(DOCTYPE|ENTITY)", xml, re.IGNORECASE):
        raise SlideError(f"{name}: its OME-XML declares entities or is over {_MAX >> 20} MB: refused")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise SlideError(f"{name}: its OME-XML is broken ({error})") from None
    found = {"openslide.vendor": "ome"}
    for element in root.iter():
        kind = element.tag.rpartition("}")[2]
        if kind == "Objective" and "NominalMagnification" in element.attrib:
            found.setdefault("ome.NominalMagnification", element.attrib["NominalMagnification"])
        if kind == "Pixels":
            for axis in "XY":
                size = element.attrib.get(f"PhysicalSize{axis}")
                unit = _UNITS.get(element.attrib.get(f"PhysicalSize{axis}Unit", "µm"))
                if size is not None and unit is not None:
                    found[f"ome.PhysicalSize{axis}"] = str(_scaled(size, unit))
            break  # later images are labels and macros
    return found


def _scaled(size: str, unit: float) -> float:
    try:
        return float(size) * unit
    except ValueError:
        return float("nan")
