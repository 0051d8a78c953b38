"""Write tiny domains for whole conversions: a few artificial dialects of short words."""

from __future__ import annotations

import json
import random
from pathlib import Path

DIALECTS = {"count": "one two three four five six", "beast": "cat dog bird fish frog ant", "sum": "1 2 3 + = 7",
            "place": "north south hill river town road"}  # fmt: skip


def save_data(folder: Path, records: int = 40, domains: int = 4) -> Path:
    """Write ``domains`` JSONL pairs of ``records`` records each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in list(DIALECTS.items())[:domains]:
        rng = random.Random(name)
        for split in ("train", "test"):
            lines = [
                json.dumps({"id": f"{name}-{split}-{i}", "text": " ".join(rng.choices(words.split(), k=40))})
                for i in range(records)
            ]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
