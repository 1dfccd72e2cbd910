"""A zip of pictures as a folder: unpacked into a temporary one, after every name and size in it was checked."""

from __future__ import annotations

import lzma
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusionfm.data.captions import plain_name
from diffusionfm.data.folder import SUFFIXES, hidden

WANTED = {*SUFFIXES, ".txt", ".jsonl", ".csv"}
MAX_MEMBERS = 200_000
MAX_BYTES = 16 * 2**30  # of all that is unpacked
MAX_RATIO = 200  # a member of over MAX_PLAIN bytes may grow so many times; pictures are compressed already
MAX_PLAIN = 2**24
MAX_PLAIN_SUM = 2**30  # likewise of all that is unpacked, beside the whole archive
BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)


@contextmanager
def as_folder(data: str | Path) -> Iterator[Path]:
    """The folder that `data` is; of a .zip a temporary one with its pictures and captions, removed afterwards.

    Nothing but pictures, .txt, .jsonl and .csv is unpacked. ValueError, before anything is, for a zip with names
    that lead outside, links, passwords, members twice, or contents that grow beyond all measure; and, later, for
    what is wrong with the pictures: errors name the zip, not the temporary folder.
    """
    path = Path(data)
    if path.is_dir() or path.suffix.lower() == ".tar":
        if not path.exists():
            raise ValueError(f"no such shard: {path}")
        yield path
        return
    if not path.is_file():
        raise ValueError(f"no such folder: {path}")
    if path.suffix.lower() != ".zip":
        raise ValueError(f"{path} is not a folder: give a folder of pictures, a .zip of one, or a .tar shard")
    with tempfile.TemporaryDirectory(prefix="diffusionfm-") as made:
        folder = Path(made).resolve()
        try:
            yield unpack(path, folder, MAX_BYTES)
        except ValueError as error:
            if str(folder) not in str(error):
                raise
            raise ValueError(str(error).replace(str(folder), str(path))) from error


def unpack(path: Path, folder: Path, most: int) -> Path:
    """Unpack what is wanted into a new folder; returns the only folder that lies at the top of it, or else `folder`.

    most: bytes that all of it may come to. ValueError as of `as_folder`."""
    folder = folder.resolve()
    try:
        with zipfile.ZipFile(path) as archive:
            for name, member in _wanted(archive, path, folder, most).items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file)  # never more than the size that was checked
    except BAD_ZIP as error:
        raise ValueError(f"{path} is not a zip that can be read ({error}): pack it again") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} holds a file and a folder of one name: pack it again") from error
    except OSError as error:
        if error.errno is not None:  # the system's; bzip2 has none
            raise
        raise ValueError(f"{path} is not a zip that can be read ({error}): pack it again") from error
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _wanted(archive: zipfile.ZipFile, path: Path, folder: Path, most: int) -> dict[str, zipfile.ZipInfo]:
    """Plain name -> member of all that is to be unpacked, the whole directory checked."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"{path} holds {len(members):,} files: at most {MAX_MEMBERS:,} are unpacked")
    wanted: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        _check_member(member, path)
        name = plain_name(folder, member.filename, str(path))
        if member.is_dir() or hidden(Path(name)) or Path(name).suffix.lower() not in WANTED:
            continue
        if name in wanted:
            raise ValueError(f"{path} holds {name} twice: pack it again")
        wanted[name] = member
    total, room = sum(member.file_size for member in wanted.values()), shutil.disk_usage(folder).free
    if total > min(most, room):
        raise ValueError(
            f"{path} unpacks to {total:,} bytes: at most {min(most, room):,} fit; unpack it yourself"
        )
    packed = path.stat().st_size  # and not the sum of what members tell: they may share their bytes
    if total > MAX_PLAIN_SUM and total > MAX_RATIO * packed:
        raise ValueError(f"{path} unpacks to {total:,} bytes from {packed:,}: no pictures do; it is refused")
    return wanted


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    if stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"{path}: {member.filename!r} is a link: pack the picture itself")
    if max(len(part.encode()) for part in member.filename.split("/")) > 255:
        raise ValueError(f"{path}: {member.filename[:40]!r}... is too long a name: rename it and pack again")
    if member.flag_bits & 1:
        raise ValueError(f"{path} is encrypted: unpack it yourself and give the folder")
    if member.file_size > MAX_PLAIN and member.file_size > MAX_RATIO * max(1, member.compress_size):
        raise ValueError(
            f"{path}: {member.filename!r} unpacks to {member.file_size:,} bytes from {member.compress_size:,}: "
            "no picture does; it is refused"
        )
