"""Define the settings of the marks that say that an image is generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from batch_infer.errors import SettingsError

Mark = Literal["iptc", "c2pa", "watermark"]
NO_MARKS = "none"


@dataclass(frozen=True, slots=True)
class C2paSigner:
    """Paths of the PEM files that sign images: a chain of certificates, the signer's first, and its private key.

    `repr` leaves the paths out, so that no log or traceback contains them.
    """

    certificates: str = field(repr=False)
    private_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProvenanceSettings:
    """The marks of every image file, and whether the file contains its prompts.

    run.json does not record `signer`: an OUT from elsewhere must not choose the key with which another command signs.
    """

    marks: tuple[Mark, ...] = ("iptc",)
    prompt_metadata: bool = True
    signer: C2paSigner | None = None


def parse_marks(text: str) -> tuple[Mark, ...]:
    """Parse marks that are separated by commas, or `none`, and return them in the order of `Mark`.

    Raises SettingsError.
    """
    names = {name.strip() for name in text.split(",")}
    if names == {NO_MARKS}:
        return ()
    if unknown := sorted(names.difference(get_args(Mark))):
        is_none = unknown == [NO_MARKS]
        reason = f"`{NO_MARKS}` cannot be combined with other marks" if is_none else f"{unknown[0]!r} is not a mark"
        raise SettingsError(
            f"--provenance {text}: {reason}; give {', '.join(get_args(Mark))}, several of them separated by commas, or "
            f"{NO_MARKS}"
        )
    return tuple(mark for mark in get_args(Mark) if mark in names)


def make_signer(certificates: str | None, private_key: str | None) -> C2paSigner | None:
    """Return the signer that two options name, or None without both. A leading `~` becomes the home folder.

    Raises SettingsError if only one is given.
    """
    if certificates is None and private_key is None:
        return None
    if certificates is None or private_key is None:
        given, missing = ("--c2pa-cert", "--c2pa-key") if private_key is None else ("--c2pa-key", "--c2pa-cert")
        raise SettingsError(f"{given} needs {missing}: a signature is made with a certificate and its private key")
    return C2paSigner(_expand_home("--c2pa-cert", certificates), _expand_home("--c2pa-key", private_key))


def _expand_home(option: str, path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise SettingsError(f"{option} {path}: no such user; write the path of the home folder") from error
