r"""Makes the three corpora and the tokenizer out of two files of parallel paragraphs.

python experiments/multilingual/prepare.py --data=FOLDER --out=runs/multilingual/data

FOLDER holds en-fr.jsonl.gz and en-ja.jsonl.gz: paragraphs of the Python documentation with their translations. Each
English paragraph is assigned by its hash to one of the three languages and kept in that language alone, if it has it:
so nothing in a later stage translates a paragraph of an earlier one.

OUT gets english.jsonl, french.jsonl, japanese.jsonl (column `text`), and the tokenizer, trained on what the runs train
on: the paragraphs that the packing will hold out are left out.
"""

import gzip
import hashlib
import json
import os
from pathlib import Path

from absl import flags

from jaxcl import bpe
from jaxcl.main import cli
from jaxcl.schema import UserError

DATA = flags.DEFINE_string("data", os.environ.get("JAXCL_DATA"), "Folder of the parallel files (or JAXCL_DATA).")
OUT = flags.DEFINE_string("out", "runs/multilingual/data", "Folder to make.")
VOCAB = 4096
HELD_OUT = 0.05  # as in jaxcl.domains.Packing
LANGUAGES = ("english", "french", "japanese")
FILES = {"en-fr.jsonl.gz": "fr", "en-ja.jsonl.gz": "ja"}


def number(text):
    """Returns a 64-bit hash: what jaxcl.data.prepare splits by."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def held_out(text):
    """Returns whether jaxcl.data.prepare keeps the document for evaluation."""
    return number(text) < int(HELD_OUT * 2**64)


def paragraphs(data):
    """Returns English paragraph -> its text by language: en, and fr and ja where translated; in the order of files."""
    found = {}
    for name, code in FILES.items():
        path = Path(data) / name
        if not path.exists():
            raise UserError(f"--data={data}: has no {name}; give the folder of the parallel files")
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                pair = json.loads(line)
                found.setdefault(pair["en"], {"en": pair["en"]})[code] = pair[code]
    return found


def corpora(found):
    """Returns language -> its paragraphs; no two languages have the same paragraph."""
    made = {language: [] for language in LANGUAGES}
    for english, texts in found.items():
        chosen = number("part of " + english) % 3
        code = ("en", "fr", "ja")[chosen]
        if code in texts:
            made[LANGUAGES[chosen]].append(texts[code])
    return {language: list(dict.fromkeys(texts)) for language, texts in made.items()}


def prepare(data, out):
    """Writes corpora and tokenizer, unless they are there."""
    out = Path(out)
    if (out / "tokenizer").exists():
        return out
    if not data:
        raise UserError("--data: missing; give the folder of the parallel files, or set JAXCL_DATA")
    made = corpora(paragraphs(data))
    out.mkdir(parents=True, exist_ok=True)
    for language, texts in made.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (out / f"{language}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{language}: {len(texts)} paragraphs, {sum(len(text.encode()) for text in texts) / 1e6:.2f} MB")
    seen = (text for texts in made.values() for text in texts if not held_out(text))
    bpe.write(out / "tokenizer", bpe.train(seen, VOCAB))
    return out


def main(argv):
    flags.FLAGS(argv)
    prepare(DATA.value, OUT.value)
    return 0


if __name__ == "__main__":
    cli(main)
