"""The peer of data_pipeline.py: the same rows with Hugging Face datasets, and the batches read back.

Needs datasets and transformers only, in an environment of its own. The argument is the work as JSON. Two forms:
"datasets" is what the language-model examples of transformers do (one map tokenises, one groups), "lean" the fastest
that we could write (one map, the library of tokenizers itself, arrays instead of lists).
"""

import hashlib
import itertools
import json
import os
import resource
import sys
import time

import datasets
import numpy as np
import tokenizers
import transformers

work = json.loads(sys.argv[1])
os.environ["TOKENIZERS_PARALLELISM"] = str(work["threads"]).lower()
datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
span, folder = work["length"] + 1, work["folder"]
fast = transformers.PreTrainedTokenizerFast(
    tokenizer_file=work["tokenizer"],
    bos_token="<|begin_of_text|>",
    eos_token="<|end_of_text|>",
    pad_token="<|pad|>",
    split_special_tokens=True,
)
bos, eos, pad = fast.bos_token_id, fast.eos_token_id, fast.pad_token_id
library = tokenizers.Tokenizer.from_file(work["tokenizer"])
library.encode_special_tokens = True


def spent():
    """Returns seconds on the wall and CPU-seconds of this process and of the children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def timed(call):
    """Returns what a function returns, and its seconds."""
    wall, cpu = spent()
    value = call()
    after = spent()
    return value, {"wall_s": after[0] - wall, "cpu_s": after[1] - cpu}


def tokenise(batch):
    coded = fast(
        batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return {"input_ids": [[bos, *ids, eos] for ids in coded["input_ids"]]}


def group(batch):
    joined = list(itertools.chain.from_iterable(batch["input_ids"]))
    joined += [pad] * (-len(joined) % span)  # the examples drop this rest; equal work keeps it
    return {"input_ids": [joined[i : i + span] for i in range(0, len(joined), span)]}


def lean(batch):
    parts = []
    for coded in library.encode_batch_fast(batch["text"], add_special_tokens=False):
        parts += [[bos], coded.ids, [eos]]
    size = sum(map(len, parts))
    joined = np.full(-(-size // span) * span, pad, np.int32)
    np.concatenate(parts, out=joined[:size], casting="unsafe")
    return {"input_ids": joined.reshape(-1, span)}


def prepare():
    """Writes the rows."""
    workers = work["processes"] if work["processes"] > 1 and not work["threads"] else None
    rows = datasets.load_dataset("json", data_files=work["corpus"], split="train", cache_dir=f"{folder}/cache")
    kept = {"input_ids": datasets.List(datasets.Value("int32"))}
    options = {"batched": True, "num_proc": workers, "remove_columns": rows.column_names}
    if work["lean"]:
        rows = rows.map(lean, features=datasets.Features(kept), **options)
    else:
        rows = rows.map(tokenise, features=datasets.Features(kept), **options)
        rows = rows.map(group, batched=True, num_proc=workers, features=datasets.Features(kept))
    rows.save_to_disk(f"{folder}/rows")


def read(rows, order):
    """Reads all rows once, in batches; returns the sum of the targets."""
    total, size = 0, work["batch"]
    for start in range(0, len(order) - size + 1, size):
        tokens = rows[order[start : start + size]]["input_ids"]
        total += int(tokens[:, 1:].sum())
    return total


_, preparing = timed(prepare)
rows = datasets.load_from_disk(f"{folder}/rows").with_format("numpy")
stream = rows[:]["input_ids"].ravel()
stream = stream[stream != pad].astype(np.uint32)
order = np.random.default_rng(0).permutation(len(rows))
read(rows, order[: 4 * work["batch"]])
total, reading = timed(lambda: read(rows, order))
print(
    json.dumps(
        {
            "tokens": len(stream),
            "sha256": hashlib.sha256(stream.tobytes()).hexdigest(),
            "rows": len(rows),
            "prepare": preparing,
            "read": reading | {"tokens": len(order) // work["batch"] * work["batch"] * work["length"]},
            "versions": {m.__name__: m.__version__ for m in (datasets, transformers, tokenizers, np)},
        }
    )
)
