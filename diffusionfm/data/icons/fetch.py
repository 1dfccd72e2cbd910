"""Packages through their own clients: npm pack and apt-get download, unpacked into a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A pinned package: `manager` is npm or apt."""

    manager: str
    name: str
    version: str


def default_cache() -> Path:
    """Where packages are kept between builds: $XDG_CACHE_HOME/diffusionfm/packages, or ~/.cache/..."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusionfm" / "packages"


def fetch(package: Package, cache: Path | None = None) -> Path:
    """Folder of the unpacked package, downloaded once. `ValueError` when its client is missing or refuses."""
    cache = cache or default_cache()
    slug = f"{package.manager}-{package.name}-{package.version}".replace("/", "_").replace(":", "_")
    folder = cache / slug
    if folder.is_dir():
        return folder
    partial = cache / f".partial-{slug}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "archive").mkdir(parents=True)
    try:
        unpack = {"npm": _npm, "apt": _apt}.get(package.manager)
        if unpack is None:
            raise ValueError(f"package {package.name}: manager must be npm or apt, not {package.manager!r}")
        unpack(package, partial / "archive", partial / "files")
        (partial / "files").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not installed; it is needed to fetch {command[-1]}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ValueError(f"`{' '.join(command)}` failed: {' '.join(reason)}")


def _npm(package: Package, archive: Path, files: Path) -> None:
    _run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], archive)
    with tarfile.open(next(archive.glob("*.tgz"))) as tar:
        tar.extractall(files, filter="data")
    inner = files / "package"
    if inner.is_dir():
        moved = files.with_name("inner")
        inner.rename(moved)
        files.rmdir()
        moved.rename(files)


def _apt(package: Package, archive: Path, files: Path) -> None:
    _run(["apt-get", "download", f"{package.name}={package.version}"], archive)
    _run(["dpkg-deb", "-x", str(next(archive.glob("*.deb"))), str(files)], archive)
