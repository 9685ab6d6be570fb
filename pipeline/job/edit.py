"""Change values of a job file in its text, so that comments and everything else stay as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import JobError, PipelineError
from pipeline.files.atomic import atomic_file
from pipeline.job.job_file import load_job


def set_cache_keys(path: Path, values: Mapping[str, Any]) -> None:
    """Set keys of the section `cache` of a job file, and replace the file.

    values: numbers, or mappings of numbers. Raises JobError, and writes nothing, if the file cannot be read, or if the
    changed text would not describe the same job with these values, because of an alias for example.
    """
    job = load_job(path)
    wanted = job.model_copy(update={"cache": job.cache.model_copy(update=dict(values))})
    lines = ", ".join(f"{key}: {_flow(value)}" for key, value in values.items())
    by_hand = f"{path}: the file cannot be changed without risk; write this into its section `cache` by hand: {lines}"
    target = Path(os.path.realpath(path))  # a link stays one
    try:
        text = _changed(target.read_bytes().decode(), values)
        with atomic_file(target, target.suffix) as temporary:
            temporary.write_bytes(text.encode())
            os.chmod(temporary, target.stat().st_mode)
            # Paths in the file are relative to its folder, in which the temporary one is, too; its name may differ.
            changed = load_job(temporary, [f"name={_flow(job.name)}"])
            if changed != wanted:
                raise JobError(by_hand)
    except (UnicodeDecodeError, yaml.YAMLError, JobError) as error:
        raise JobError(by_hand) from error
    except OSError as error:
        raise PipelineError(f"{path}: cannot be written: {error.strerror}") from error


def _changed(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a job file with keys of its section `cache` set."""
    root = yaml.compose(text, yaml.SafeLoader)
    cache = _entries(root).get("cache")
    if cache is None:
        return f"{text.rstrip()}\ncache: {_flow(dict(values))}\n"
    assert isinstance(cache, yaml.MappingNode)  # as load_job has found
    entries = _entries(cache)
    edits = [
        (entries[key].start_mark.index, _end(entries[key]), _flow(value))
        for key, value in values.items()
        if key in entries
    ]
    added = [f"{key}: {_flow(value)}" for key, value in values.items() if key not in entries]
    if added and not cache.value:  # {}
        edits.append((cache.start_mark.index, cache.end_mark.index, f"{{{', '.join(added)}}}"))
    elif added and cache.flow_style:
        last = _end(cache.value[-1][1])
        edits.append((last, last, "".join(f", {each}" for each in added)))
    elif added:
        first = cache.value[0][0].start_mark
        separator = "\n" + " " * first.column
        edits.append((first.index, first.index, "".join(each + separator for each in added)))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _entries(node: Any) -> dict[str, yaml.Node]:
    """Return the values of a mapping by their keys."""
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _end(node: yaml.Node) -> int:
    """Return where the text of a node ends. A block's own mark is behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _flow(value: Any) -> str:
    """Return a value in YAML's flow style, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
