"""Whether a model still finds what stands once in a long text when its cache is compressed: made texts, known answers.

    python jobs/needle.py needle --model MODEL --tokens 4000 16000   # writes documents, queries and a job
    pipeline run needle/job.yaml                                     # 4 bits
    pipeline run needle/job.yaml --set cache.key_bits=8 --set cache.value_bits=8 --set output.path=needle/8-bits.parquet
    python jobs/needle.py needle --score needle/answers.parquet needle/8-bits.parquet

Each text holds five codes at five depths, among sentences that speak of other things, and is asked for each. Where few
bits find fewer codes than many, they are too few for this model. It knows texts and answers; nothing of caches.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
TEXTS = 4  # of each length
WORDS_A_TOKEN = 0.75  # about
COLOURS = ("red", "green", "blue", "white", "yellow", "violet", "brown", "grey")
THINGS = ("boat", "shed", "crane", "mill", "tower", "kiln", "wagon", "press", "bridge", "lamp")
PEOPLE = ("the miller", "a neighbour", "the harbour master", "an old friend", "the clerk", "a visitor")
DEEDS = ("walked along the canal", "mended a fence", "waited for the ferry", "counted the crates", "read the notices")
TIMES = ("before noon", "in the rain", "on the way home", "after the market", "while the bells rang")


@dataclass(frozen=True)
class Haystack:
    """A text, and what is asked of it with the answers."""

    id: str
    text: str
    asked: list[tuple[str, str]]


def haystacks(lengths: Sequence[int], seed: int) -> list[Haystack]:
    """Texts of about so many tokens."""
    draw, made = random.Random(seed), list[Haystack]()
    for length in lengths:
        for number in range(TEXTS):
            sentences = _filler(draw, int(length * WORDS_A_TOKEN))
            asked = []
            names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
            for depth, name in zip(DEPTHS, draw.sample(names, len(DEPTHS)), strict=True):
                code = str(draw.randrange(10000, 100000))
                sentences.insert(int(depth * len(sentences)), f"The code of the {name} is {code}.")
                asked.append((f"What is the code of the {name}? Answer with the number only.", code))
            made.append(Haystack(f"{length}-{number}", " ".join(sentences), asked))
    return made


def write(folder: Path, model: str, lengths: Sequence[int], seed: int) -> None:
    """Write documents, queries with their answers, and the job."""
    folder.mkdir(parents=True, exist_ok=True)
    made = haystacks(lengths, seed)
    documents = [{"id": one.id, "text": one.text} for one in made]
    queries = [
        {"document": one.id, "id": f"depth {depth:.0%}", "text": question, "answer": answer}
        for one in made
        for depth, (question, answer) in zip(DEPTHS, one.asked, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(documents), folder / "documents.parquet")
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    job = {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "documents": {"path": "documents.parquet"},
        "queries": {"path": "queries.parquet", "document_id": "document"},
        "generation": {"max_tokens": 24},
        "cache": {"dir": "cache"},
        "output": {"path": "answers.parquet"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")


def score(folder: Path, results: Sequence[Path]) -> str:
    """How many codes were found, a line a length and a column a result."""
    gold = {
        (row["document"], row["id"]): row["answer"] for row in pq.read_table(folder / "queries.parquet").to_pylist()
    }
    found: dict[str, list[str]] = {}
    for result in results:
        right: dict[str, list[bool]] = {}
        for row in pq.read_table(result).to_pylist():
            length, answer = row["document_id"].split("-")[0], gold[row["document_id"], row["query_id"]]
            for group in (length, row["query_id"]):
                right.setdefault(group, []).append(answer in (row["answer"] or ""))
        for group, each in right.items():
            found.setdefault(group, []).append(f"{sum(each)} of {len(each)}")
    lines = [("", *(result.name for result in results)), *((group, *shares) for group, shares in found.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _filler(draw: random.Random, words: int) -> list[str]:
    sentences, count = list[str](), 0
    while count < words:
        who, deed, when = draw.choice(PEOPLE), draw.choice(DEEDS), draw.choice(TIMES)
        sentences.append(f"{who.capitalize()} {deed} {when}, and spoke of the {draw.choice(THINGS)} by the water.")
        count += len(sentences[-1].split())
    return sentences


def main() -> None:
    """Write the job, or score results of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="a folder or a Hugging Face repo id")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000], help="lengths of texts, about (default: 4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", type=Path, nargs="+", metavar="RESULT", help="result files to compare")
    arguments = parser.parse_args()
    if arguments.score:
        print(score(arguments.folder, arguments.score))
        return
    if arguments.model is None:
        parser.error("--model says which model is to be tried")
    write(arguments.folder, arguments.model, arguments.tokens, arguments.seed)
    print(f"{arguments.folder / 'job.yaml'}\nnext: pipeline run {arguments.folder / 'job.yaml'}")


if __name__ == "__main__":
    main()
