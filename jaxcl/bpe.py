"""Trains a byte-level BPE on your own text: python -m jaxcl.bpe OUT --vocab=8192 FILE [FILE ...] [--column=text].

OUT holds tokenizer.json and tokenizer_config.json: what `config.tokenizer` reads with name='hf', path=OUT, and what
`transformers.AutoTokenizer.from_pretrained(OUT)` reads. Equal files and options give equal bytes.

Every text has an encoding and survives the round trip: the alphabet is the 256 bytes, nothing is normalised. `--vocab`
counts them and the three special tokens; a corpus too small for it gives a smaller one.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxcl import console
from jaxcl.data import files, sources, tokenizer
from jaxcl.schema import UserError

BOS, EOS, PAD = SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
BYTES = 256
# Where no merge crosses, as in Llama 3 (tokenizer.json of the release): English contractions, a word with the space or
# sign in front of it, up to three digits, signs, line ends, spaces. Unlike there, accents that follow a letter (\p{M})
# belong to its word.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterator[str], vocab: int) -> str:
    """Returns a tokenizer.json, as text.

    Args:
      texts: the corpus.
      vocab: number of tokens, at the most, special ones included.

    Raises:
      UserError: too few tokens, or no text.
    """
    import tokenizers  # noqa: PLC0415  (only those who use it pay for the import)

    least = BYTES + len(SPECIAL)
    if vocab < least:
        raise UserError(f"--vocab={vocab}: must be at least {least}: {BYTES} bytes and {len(SPECIAL)} special tokens")
    if vocab >= 2**31:
        raise UserError(f"--vocab={vocab}: must be below 2^31")
    texts = map(tokenizer.without_surrogates, texts)
    first = next(texts, None)
    if first is None:
        raise UserError("command line: the files hold no text; check them and --column")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=level.alphabet(), show_progress=False
    )
    tok.train_from_iterator(itertools.chain([first], texts), trainer)
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return tok.to_str(pretty=True)


def write(out: Path, text: str) -> None:
    """Writes the folder; it appears when it is complete.

    Raises:
      UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (partial / "tokenizer.json").write_text(text, encoding="utf-8")
        (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: list[str]) -> None:
    """Runs the command."""
    parser = console.Parser(prog="python -m jaxcl.bpe", description="Trains a byte-level BPE on files of text.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="file or glob pattern: text, JSON lines, Parquet, ArrayRecord"
    )
    parser.add_argument("--vocab", type=int, default=8192, metavar="N", help="number of tokens (8192)")
    parser.add_argument("--column", action="append", metavar="NAME", help="of the text (text); may be repeated")
    parser.add_argument("--max_bytes", type=int, metavar="N", help="of text to read, in the order of the files' names")
    options = parser.parse_intermixed_args(argv)
    if options.out.exists():
        raise UserError(f"{options.out}: exists; choose another folder, or remove it")
    if options.max_bytes is not None and options.max_bytes < 1:
        raise UserError(f"--max_bytes={options.max_bytes}: must be at least 1; leave it out to read all")
    texts = sources.limited(files.documents_of(options.files, *(options.column or ())), options.max_bytes)
    made = train(map(sources.text_of_document, texts), options.vocab)
    write(options.out, made)
    size = len(json.loads(made)["model"]["vocab"])
    print(f"{options.out}: {size} tokens; read it with config.tokenizer name='hf', path={str(options.out)!r}")


if __name__ == "__main__":
    console.cli(main)
