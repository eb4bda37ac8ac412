"""Where on this machine a source of faces lies, and what must not lie there."""

import re
from pathlib import Path

from common.errors import ConfigError
from common.faces.folders import BY_NAME

# Sources with a scheme whose first part may be a folder here: hf:FOLDER,split=train.
_LOCAL_SCHEMES = ("hf", "flwr-datasets")
_SCHEME = re.compile(r"([a-z-]+):")


def local_path(source: str) -> Path | None:
    """The folder or file that `source` names, absolute and without links; None for one that is no path here."""
    scheme = _SCHEME.match(source)
    if not source or (scheme and scheme[1] not in _LOCAL_SCHEMES):
        return None
    path = Path(source[scheme.end() :].partition(",")[0] if scheme else source).expanduser()
    return None if scheme and not path.exists() else path.resolve()


def absolute(source: str) -> str:
    """`source` with its path made absolute, so that it means the same from any folder; others as they are."""
    path = local_path(source)
    if path is None or source == BY_NAME:
        return source
    scheme = _SCHEME.match(source)
    if scheme is None:
        return str(path)
    _, comma, rest = source[scheme.end() :].partition(",")
    return f"{scheme[0]}{path}{comma}{rest}"


def name_of(source: str) -> str:
    """`source` without the folders that lead to it, for whoever is elsewhere: `faces` of `/home/me/faces`."""
    place, scheme = local_path(source), _SCHEME.match(source)
    if scheme is None:
        return "" if place is None else place.name or "/"
    first, *rest = source[scheme.end() :].split(",")
    # A folder that is gone is no path here any more, and is not to be told of all the same.
    gone = scheme[1] in _LOCAL_SCHEMES and Path(first).expanduser().is_absolute()
    first = place.name if place is not None else Path(first).name if gone else first
    named = (f"{key}{equals}{Path(value).name}" for key, equals, value in (part.partition("=") for part in rest))
    return f"{scheme[0]}{','.join([first, *named])}"


def overlap(one: str, other: str) -> bool:
    """Whether two sources are the same, or one lies within the other."""
    places = local_path(one), local_path(other)
    if places[0] is None or places[1] is None:
        return one == other
    return places[0] == places[1] or places[0] in places[1].parents or places[1] in places[0].parents


def refuse_among(out: Path, source: str) -> None:
    """Raise ConfigError where `out` lies among the faces of `source`: it would be read as a face."""
    place = local_path(source)
    out = out.expanduser().resolve()
    if place is not None and (out == place or place in out.parents):
        raise ConfigError(f"--out {out} lies among the faces and would be read as one: name a place outside")
