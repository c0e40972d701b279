"""A path to a slide: the fastest reader that reads the format rightly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import openslide
import tifffile
from PIL import ImageCms

from slides.errors import SlideError
from slides.image import ImageSlide, read_image, tiff_properties
from slides.levels import exact_downsample
from slides.mpp import resolve_mpp
from slides.ome import ome_properties
from slides.openslides import OpenSlideSlide, properties_of
from slides.reader import Slide
from slides.tiff import JPEG2000, MAX_TILE, Plane, TiffSlide, UnfitTiff, plane

_log = logging.getLogger(__name__)
# tifffile tells stderr of each oddity; what matters of them becomes an error of ours.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
_MOST_PAGES = 10_000
# Of openslide's formats, those whose levels are plain tiled pages, without overlaps or several areas.
_PLAIN = ("aperio", "generic-tiff")


def open_slide(path: str | Path, *, mpp: float | None = None, exact: bool = False) -> Slide:
    """Open a whole-slide image.

    Aperio, generic tiled TIFF and OME-TIFF are read tile by tile (`tiff`), everything else that openslide knows through
    openslide, and PNG, JPEG and TIFFs without tiles as one level.

    Args:
        path: the file; for MRXS, VMS and DICOM the one that openslide is given.
        mpp: what is known of it from elsewhere; goes before what the file says.
        exact: read every pixel as openslide does, also where another decoder may round differently (JPEG 2000).

    Raises:
        SlideError: it cannot be read, or its mpp is not known.
    """
    path = Path(path).expanduser()
    try:
        if not path.is_file():
            raise SlideError(f"{path}: {'is a folder, not a slide' if path.is_dir() else 'no such file'}")
        vendor = openslide.OpenSlide.detect_format(path)
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None
    ome = _ome(path) if vendor in (None, "generic-tiff") else None
    if ome is not None:
        return ome(mpp)
    if vendor is None:
        return _image(path, mpp)
    try:
        handle = openslide.OpenSlide(path)
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(f"{path}: openslide cannot open it ({' '.join(str(error).split())})") from None
    found = resolve_mpp(path.name, handle.properties, mpp)
    known = {"mpp": found.value, "mpp_source": found.source, "icc": _icc(path, handle)}
    if vendor in _PLAIN:
        _check_tiles(path, handle)
        try:
            planes = _planes(path, handle.level_dimensions, exact)
            properties = properties_of(handle)
            handle.close()
            return TiffSlide(path, planes, properties=properties, **known)
        except UnfitTiff as reason:
            _log.info("%s: read through openslide, since %s", path.name, reason)
    return OpenSlideSlide(path, handle, **known)


def _icc(path: Path, handle: openslide.OpenSlide) -> bytes | None:
    try:
        profile = handle.color_profile
    except ImageCms.PyCMSError as error:
        _log.warning("%s: its colour profile is broken (%s) and left out", path.name, error)
        return None
    return profile.tobytes() if profile is not None else None


def _check_tiles(path: Path, handle: openslide.OpenSlide) -> None:
    """openslide ends the whole process where a tile does not fit into memory: such a header must not get that far.

    Raises:
        SlideError: tiles are impossibly large.
    """
    for level in range(handle.level_count):
        sides = [handle.properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height")]
        if int(sides[0]) * int(sides[1]) > MAX_TILE:
            raise SlideError(f"{path}: its header is broken: tiles of {' x '.join(sides)} pixels: copy it again")


def _planes(path: Path, sizes: tuple[tuple[int, int], ...], exact: bool) -> list[Plane]:
    """The tiled pages that hold openslide's levels.

    What it leaves to openslide must not end the process either, see `_check_tiles`.

    Raises:
        UnfitTiff: a level is stored in another way.
        SlideError: a level's header makes no sense.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = _tiled_pages(path, tiff.pages)
            bysize = {(page.imagewidth, page.imagelength): page for page in reversed(pages)}
            most = max((count for page in pages for count in page.databytecounts), default=0)
            try:
                if exact and any(page.compression in JPEG2000 for page in pages):
                    raise UnfitTiff("JPEG 2000 is decoded exactly")
                return [plane(bysize[size], exact_downsample(sizes[0], size)) for size in sizes]
            except (UnfitTiff, KeyError) as error:
                if most > MAX_TILE:
                    raise SlideError(f"{path}: its header is broken: a tile of {most} bytes: copy it again") from None
                if isinstance(error, KeyError):
                    raise UnfitTiff(f"no tiled page has {error.args[0]} pixels") from None
                raise
    except (UnfitTiff, SlideError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:150]
        raise SlideError(f"{path}: its header is broken ({why}): copy or export it again") from None


def _tiled_pages(path: Path, pages: Iterable[tifffile.TiffPage | tifffile.TiffFrame]) -> list[tifffile.TiffPage]:
    """Those with tiles. tifffile would follow headers that point back to each other for ever.

    Raises:
        SlideError: they do, or there are too many.
    """
    seen: dict[int, tifffile.TiffPage | tifffile.TiffFrame] = {}
    for page in pages:
        if page.offset in seen or len(seen) == _MOST_PAGES:
            raise SlideError(f"{path}: its header is broken: its images go round, or are too many: copy it again")
        seen[page.offset] = page
    return [page for page in seen.values() if isinstance(page, tifffile.TiffPage) and page.is_tiled]


def _ome(path: Path) -> Callable[[float | None], TiffSlide] | None:
    """How to open it where it is a tiled OME-TIFF, else None."""
    try:
        with tifffile.TiffFile(path) as tiff:
            xml = tiff.pages.first.description if tiff.is_ome else ""
            if not xml:
                return None
            properties = ome_properties(path.name, xml)
            page = tiff.pages.first
            levels = [page, *_tiled_pages(path, page.pages or ())] if isinstance(page, tifffile.TiffPage) else []
            size0 = (levels[0].imagewidth, levels[0].imagelength)
            planes = [plane(one, exact_downsample(size0, (one.imagewidth, one.imagelength))) for one in levels]
            icc = page.iccprofile if isinstance(page, tifffile.TiffPage) else None
    except UnfitTiff as reason:
        raise SlideError(f"{path}: an OME-TIFF not read, since {reason}: convert it to tiled 8-bit RGB") from None
    except SlideError:
        raise
    except Exception:  # no TIFF, or a broken one: openslide or Pillow say what is wrong
        return None

    def opened(mpp: float | None) -> TiffSlide:
        found = resolve_mpp(path.name, properties, mpp)
        return TiffSlide(path, planes, mpp=found.value, mpp_source=found.source, properties=properties, icc=icc)

    return opened


def _image(path: Path, mpp: float | None) -> Slide:
    tiled = _tiled(path)
    if tiled is not None:
        planes, properties, icc = tiled
        found = resolve_mpp(path.name, properties, mpp)
        return TiffSlide(path, planes, mpp=found.value, mpp_source=found.source, properties=properties, icc=icc)
    pixels, properties, icc = read_image(path)
    found = resolve_mpp(path.name, properties, mpp)
    return ImageSlide(path, pixels, mpp=found.value, mpp_source=found.source, properties=properties, icc=icc)


def _tiled(path: Path) -> tuple[list[Plane], Mapping[str, str], bytes | None] | None:
    """A tiled TIFF that openslide does not know (grey, RGBA), as one level or more."""
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = _tiled_pages(path, tiff.pages)
            if not pages:
                return None
            size0 = (pages[0].imagewidth, pages[0].imagelength)
            planes = [plane(page, exact_downsample(size0, (page.imagewidth, page.imagelength))) for page in pages]
            return planes, tiff_properties(pages[0]), pages[0].iccprofile
    except UnfitTiff as reason:
        raise SlideError(f"{path}: a tiled TIFF that cannot be read, since {reason}: convert it to 8-bit RGB") from None
    except SlideError:
        raise
    except Exception:  # no TIFF
        return None
