"""Results on disk, one JSON object a line, appended as they come: a run that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ConfigError


class Store:
    """Scores by key.  A last line that a kill cut short counts as not there; `path` None keeps everything in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, list[list[float]]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text("utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole, "utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot keep results in {path}: {error}") from None
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.found[entry["key"]] = entry["scores"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ConfigError(f"{path}, line {number}, is not a result; move the file away to start anew") from None

    def add(self, key: str, scores: list[list[float]]) -> None:
        """Keep the scores of the questions of some cases."""
        self.found[key] = scores
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "scores": scores}) + "\n")
