"""Command line that writes a run as a Hugging Face checkpoint: python -m jaxcl.hf export RUN OUT [--step=N].

OUT holds what `transformers` loads: config.json, generation_config.json, the tokenizer, safetensors; and jaxcl.json,
which says what the weights were trained on: source, licence, fingerprint and tokens of every corpus.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxcl import checksum, console, weights
from jaxcl.data import tokenizer as tokenizers
from jaxcl.hf import arithmetic, families, files, peft, read, write
from jaxcl.models import lora
from jaxcl.schema import UserError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def export(run: Path, out: Path, *, step: int | None = None, dtype: str | None = None) -> int:
    """Writes the weights of a run at a checkpoint as a Hugging Face folder; returns the step.

    Args:
      run: folder of a run of a transformer.
      out: folder to make.
      step: of a checkpoint; None = the newest.
      dtype: of the tensors; None = that of the checkpoint the run started from, or float32.

    Raises:
      UserError: no such run or checkpoint, a model that no family describes, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder, or remove it")
    found = weights.load(run, step=step)
    shape, source = found.network.shape, found.network.checkpoint
    if shape is None:
        raise UserError(f"{run}: its model is no transformer; only transformers have a Hugging Face format")
    original = files.config(source) if source and (Path(source) / "config.json").exists() else {}
    config = families.config(shape, original)
    kind = families.family(config, str(out))
    chosen = DTYPES[dtype] if dtype else np.dtype(read.stored_dtype(source) if source and original else np.float32)
    adapter = found.network.adapter
    params = found.params if adapter is None else lora.merge(found.params, adapter.alpha, chosen)
    with write.Writer(out) as writer:
        for name, tensor in write.tensors(params, shape, kind, chosen):
            writer.add(name, tensor)
        ends = _ends(found, original)
        writer.json("config.json", config | {"dtype": chosen.name} | ends)
        writer.json("generation_config.json", _generation(source, ends))
        _tokenizer(writer, found)
        writer.json("jaxcl.json", provenance(found))
    return found.step


def export_adapter(run: Path, out: Path, *, step: int | None = None) -> int:
    """Writes the adapter of a run at a checkpoint, and the tokenizer, as a PEFT folder; returns the step.

    Raises:
      UserError: no such run or checkpoint, a run without an adapter, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder, or remove it")
    found = weights.load(run, step=step)
    adapter = found.network.adapter
    if adapter is None:
        raise UserError(f"{run}: has no adapter; export it without --adapter")
    base, shape = found.network.checkpoint, found.network.shape
    if base and shape and read.fields(base)["vocab"] != shape.vocab:
        raise UserError(f"{run}: its vocabulary has grown, which no adapter holds; export it merged, without --adapter")
    peft.export(
        out,
        found.params["lora"],
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        # PEFT looks from wherever it is started.
        base=None if base is None else str(Path(base).expanduser().absolute()),
        provenance=provenance(found) | {"base_checksums": checksum.table(found.params["base"])},
        beside=lambda writer: _tokenizer(writer, found),
    )
    return found.step


def provenance(found: weights.Weights) -> dict[str, Any]:
    """Returns what the weights are and what they were trained on, as JSON."""
    about = found.about
    sources = {
        name: entry | {"consumed": found.ledger.get(name, {})} for name, entry in about["facts"]["sources"].items()
    }
    base = found.network.checkpoint
    return {"run": about["id"], "step": found.step, "base": base, "sources": sources, "versions": about["versions"]}


def _ends(found: weights.Weights, original: dict[str, Any]) -> dict[str, Any]:
    """Returns the tokens that begin and end a text: those of the source, where the run has its tokenizer."""
    words, own = found.tokenizer, not found.about["config"].get("tokenizer")
    ends = {"bos_token_id": words.bos, "eos_token_id": words.eos}
    return {key: original.get(key, value) if own else value for key, value in ends.items()}


def _generation(source: str | None, ends: dict[str, Any]) -> dict[str, Any]:
    """Returns generation_config.json: that of the source, if it has one."""
    if source and (Path(source) / "generation_config.json").exists():
        return files.config(source, "generation_config.json")
    return ends | {"do_sample": False}


def _tokenizer(writer: write.Writer, found: weights.Weights) -> None:
    """Writes the files of the tokenizer."""
    options = found.about["config"].get("tokenizer") or {}
    path = options.get("path") or (None if options else found.network.checkpoint)
    if path is None:
        writer.json("tokenizer.json", json.loads(tokenizers.byte_json()))
        names = dict(zip(("bos_token", "eos_token", "pad_token"), tokenizers.BYTE_NAMES, strict=True))
        writer.json("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        return
    place = Path(path).expanduser()
    held = [place / name for name in write.TOKENIZER_FILES] if place.is_dir() else [place]
    for file in held:
        if file.exists():
            writer.copy(file)


def main(argv: list[str]) -> None:
    """Runs the command."""
    parser = console.Parser(prog="python -m jaxcl.hf", description="Hugging Face checkpoints out of jaxcl.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=console.Parser)
    add = commands.add_parser("export", help="write a run as a folder that transformers loads")
    add.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    add.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    add.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest by default")
    add.add_argument("--dtype", choices=sorted(DTYPES), help="of the tensors; as imported by default")
    add.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, for PEFT; else it is merged")
    add.set_defaults(act=_export)
    arithmetic.add_commands(commands)
    options = parser.parse_args(argv)
    options.act(options)


def _export(options: argparse.Namespace) -> None:
    if options.adapter:
        if options.dtype:
            raise UserError("--dtype: an adapter is float32; leave it out")
        step = export_adapter(options.run, options.out, step=options.step)
        print(f"{options.out}: adapter of {options.run} at step {step}; load it with PeftModel.from_pretrained")
        return
    step = export(options.run, options.out, step=options.step, dtype=options.dtype)
    print(f"{options.out}: {options.run} at step {step}; load it with AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    console.cli(main)
