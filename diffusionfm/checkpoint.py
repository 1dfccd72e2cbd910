"""State that survives: safetensors and JSON, written aside, synced, renamed, checked; and warm starts."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "state.json"


class CheckpointError(OSError, ValueError):
    """State that could not be written; what was there before is intact."""


@contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """A full or refusing disk inside the `with` block becomes one CheckpointError that names the fix."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {target} ({_one_line(error)}); free some disk space and run again"
        ) from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """A missing or damaged file inside the `with` block becomes one ValueError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({_one_line(error)}); remove it and run again") from error


def save(folder: str | Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write `folder` with one NAME.safetensors per entry of `tensors` and a state.json, whole or not at all.

    `state` (JSON-able) gets a `files` entry with each file's size and SHA-256. An old folder is replaced.
    Raises CheckpointError (an OSError) when the disk is full or refuses; the target is then as it was.
    """
    folder = Path(folder)
    aside = begin(folder)
    try:
        finish(
            folder,
            write_files(aside, {f"{name}.safetensors": group for name, group in tensors.items()}),
            state,
        )
    except CheckpointError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def begin(folder: Path) -> Path:
    """Make and return the empty folder in which the files of checkpoint `folder` are collected."""
    aside = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    return aside


def write_files(aside: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write safetensors files by name into `aside`; returns the size and SHA-256 of each, all on disk."""
    with writing(aside):
        for name, group in files.items():
            save_file(_storable(group), aside / name)
        found = {name: _describe(aside / name) for name in files}
        for name in files:
            _sync(aside / name)
    return found


def finish(folder: Path, files: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
    """Add state.json to the collected files and put them in the place of `folder`."""
    aside = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        write_json(aside / STATE, {**state, "files": files})
        replace_folder(aside, folder)


def shard_name(name: str, rank: int, ranks: int) -> str:
    """The file of one rank's share of the tensors `name`: NAME.00000-of-00004.safetensors."""
    return f"{name}.{rank:05d}-of-{ranks:05d}.safetensors"


def load(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint, whichever number of ranks wrote it: (whole tensors on the CPU, state).

    Raises ValueError when a file is damaged.
    """
    folder = Path(folder)
    fault = find_fault(folder)
    if fault:
        raise ValueError(f"{folder} is not a complete checkpoint: {fault}; remove the folder and run again")
    state = state_of(folder)
    shares: dict[str, list[dict[str, Tensor]]] = {}
    for file in sorted(state["files"]):
        shares.setdefault(file.partition(".")[0], []).append(load_file(folder / file))
    return {name: _joined(parts) for name, parts in shares.items()}, state


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every rank's rows of the tensors that all ranks have, one under the other; the rest are the first's."""
    if len(parts) == 1:
        return parts[0]
    return {
        key: torch.cat([part[key] for part in parts]) if key in parts[1] else value
        for key, value in parts[0].items()
    }


def find_fault(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is there and hashes right."""
    folder = Path(folder)
    try:
        files = json.loads((folder / STATE).read_text())["files"]
        for name, known in files.items():
            if (folder / name).stat().st_size != known["size"] or _describe(folder / name) != known:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{STATE} is damaged"
    return None


def state_of(folder: Path) -> dict[str, Any]:
    """The state.json of a whole checkpoint."""
    return json.loads((folder / STATE).read_text())


def listing(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, complete or not."""
    return sorted((Path(run_dir) / "checkpoints").glob("step_*"))


def step_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def latest(run_dir: str | Path, usable: Callable[[dict[str, Any]], bool] | None = None) -> Path | None:
    """The newest complete checkpoint of a run whose state is `usable`; broken ones are passed over."""
    for folder in reversed(listing(run_dir)):
        fault = find_fault(folder)
        if fault:
            print(f"passing over {folder}: {fault}")
        elif usable is None or usable(state_of(folder)):
            return folder
    return None


def prune(run_dir: str | Path, keep: int, stable: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the newest up to step `stable` to extend from."""
    folders = listing(run_dir)
    before = [folder for folder in folders if folder <= step_folder(run_dir, stable)]
    for folder in folders[: -max(keep, 1)]:
        if folder not in before[-1:]:
            shutil.rmtree(folder)


def discard_after(run_dir: str | Path, step: int) -> None:
    """Remove checkpoints newer than `step`, where a run starts again, and what killed saves left behind."""
    for folder in listing(run_dir):
        if folder > step_folder(run_dir, step):
            shutil.rmtree(folder)
    for leaving in (Path(run_dir) / "checkpoints").glob(".step_*"):
        shutil.rmtree(leaving)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Where to write inside the `with` block what then takes the place of `path`; a block that fails leaves nothing."""
    aside = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            yield aside
            _sync(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON to a file whole or not at all."""
    with _aside(Path(path)) as aside, open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def write_weights(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file whole or not at all."""
    with _aside(Path(path)) as aside:
        save_file(_storable(tensors), aside, metadata={"format": "pt", **(metadata or {})})


def export(folder: Path, networks: dict[str, nn.Module]) -> None:
    """Write NAME.safetensors of each network, and the folder NAME of those with save_pretrained; each whole or not."""
    for name, network in networks.items():
        write_weights(folder / f"{name}.safetensors", network.state_dict())
        if hasattr(network, "save_pretrained"):
            aside = folder / f".{name}.partial"
            network.save_pretrained(aside)  # type: ignore[operator]
            replace_folder(aside, folder / name)


def weights_hash(network: nn.Module) -> str:
    """12 hex digits of the SHA-256 over a network's weights and buffers: which network made something.

    An upscaler does not count: a decoder that draws larger has the latents it had."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if name.startswith("upscaler."):
            continue
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`, on disk before this returns."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    _sync(new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def shapes(networks: dict[str, nn.Module]) -> dict[str, list[int]]:
    """The shape of every tensor of the networks, by `network/tensor` name: what a checkpoint has to fit."""
    return {
        f"{name}/{key}": list(value.shape)
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def differences(known: dict[str, list[int]], now: dict[str, list[int]], most: int = 3) -> str:
    """How two tables of parameter shapes differ, in words; '' when they do not."""
    words = [
        f"{name} is {now[name]}, was {known[name]}"
        for name in now
        if name in known and now[name] != known[name]
    ]
    words += [f"{name} is new" for name in now if name not in known]
    words += [f"{name} is gone" for name in known if name not in now]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return "; ".join(words[:most]) + more


def warm_start(networks: dict[str, nn.Module], path: str | Path) -> str:
    """Load weights into the networks from a run folder, a pipeline folder or a file; returns what was loaded.

    Each network found is loaded strictly; networks the folder does not have stay as they are and are named.
    """
    root, loaded, fresh = Path(path), [], []
    if not root.exists():
        raise ValueError(f"trainer.init={path}: no such file or folder")
    for name, network in networks.items():
        files = [root / f"{name}.safetensors"]
        for folder in (root / name, root if len(networks) == 1 else root / name):
            files += [folder / f"{stem}.safetensors" for stem in ("diffusion_pytorch_model", "model")]
        found = (
            root if root.is_file() and len(networks) == 1 else next((f for f in files if f.is_file()), None)
        )
        if found is None:
            fresh.append(name)
            continue
        with reading(found):
            tensors = load_file(found)
        try:
            network.load_state_dict(with_ties(network, tensors), strict=True)
        except RuntimeError as error:
            raise ValueError(f"trainer.init: {found} does not fit {name}: {_one_line(error)}") from error
        loaded.append(name)
    if not loaded:
        raise ValueError(f"trainer.init={path} holds no weights (safetensors) of {', '.join(networks)}")
    return ", ".join(loaded) + (f" (fresh: {', '.join(fresh)})" if fresh else "")


def with_ties(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the names that tied weights go by and that an exported file leaves out."""
    by_place: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for key, value in network.state_dict().items():
        if value.numel():
            by_place.setdefault((value.data_ptr(), tuple(value.shape)), []).append(key)
    full = dict(tensors)
    for keys in by_place.values():
        given = next((key for key in keys if key in tensors), None)
        if given is not None:
            full |= {key: tensors[given] for key in keys if key not in tensors}
    return full


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        plain = tensor.detach().contiguous()
        result[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return result


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
