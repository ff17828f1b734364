"""Sort the story and encyclopaedia texts into the files that the two configurations beside this one train on.

    python examples/stories/prepare.py SOURCE TARGET

SOURCE holds stories/ and wikipedia/ and books/ (README.md says which files and where they come from). Short stories and
whole books are separated so that the former can be repeated; the TinyStories sample is cut into its stories.
"""

import json
import lzma
import re
import shutil
import sys
from pathlib import Path

# UTF-8 that was once read as Windows-1252, as it stands in the TinyStories sample
MOJIBAKE = {"â€œ": "“", "â€\x9d": "”", "â€™": "’", "â€˜": "‘", "â€”": "—", "â€“": "–", "â€¦": "…", "Ã©": "é", "â€": "”"}
SHORT = 20_000  # characters; longer "stories" are whole books


def rows(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write(path: Path, texts: list[str]) -> None:
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text.strip())
    print(f"{path}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes")


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    stories = rows(source / "stories/children_stories_train.jsonl.xz")
    write(target / "short_stories.jsonl.xz", [text for text in stories if len(text) <= SHORT])
    write(target / "story_books.jsonl.xz", [text for text in stories if len(text) > SHORT])
    with lzma.open(source / "stories/tinystories_train_sample.txt.xz", "rt", encoding="utf-8") as file:
        tiny = file.read()
    for wrong, right in MOJIBAKE.items():
        tiny = tiny.replace(wrong, right)
    write(target / "tiny_stories.jsonl.xz", re.split(r"(?<!\n)\n(?!\n)", tiny))  # stories end in a single newline
    for name in (
        "wikipedia/wiki_en_2021_train",
        "wikipedia/wiki_en_2021_valid",
        "stories/children_stories_valid",
        "books/novels100_train",
    ):
        shutil.copyfile(source / f"{name}.jsonl.xz", target / f"{name.split('/')[1]}.jsonl.xz")
    shutil.copyfile(source / "stories/tinystories_valid_sample.txt.xz", target / "tiny_stories_valid.txt.xz")
    shutil.copyfile(source / "books/eltec_valid.jsonl.xz", target / "novels_valid.jsonl.xz")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
