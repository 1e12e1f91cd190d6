"""The peer of rl_step.py: one step of TRL's GRPOTrainer on a random Llama, whenever a line arrives on stdin.

Needs torch, transformers and trl only, in an environment of its own. The argument is the shape as JSON. Nothing is
downloaded: the tokenizer has one word for each number. All but words is suppressed, so that completions are full.
"""

import ctypes
import json
import os
import sys
import tempfile
import time

shape = json.loads(sys.argv[1])
if shape["keep_pages"]:  # the options of glibc's mallopt(3) that jaxcl/allocator.py sets
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
        ctypes.CDLL(None).mallopt(parameter, value)
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

torch.manual_seed(0)
GPU = shape["gpu"]
if not GPU:
    torch.set_num_threads(1)
SPECIAL = ["<pad>", "<bos>", "<eos>"]
words = SPECIAL + [str(i) for i in range(len(SPECIAL), shape["vocab"])]
inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
)
model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["embed"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
)
numbers = torch.randint(len(SPECIAL), shape["vocab"], (512, shape["prompt"])).tolist()
rows = datasets.Dataset.from_list([{"prompt": " ".join(map(str, row))} for row in numbers])
lengths, spent, start = [], {}, []


def clock() -> tuple[float, float]:
    """Returns CPU-seconds and seconds, when all that was started is done."""
    if GPU:
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def reward(completion_ids, **_):
    """Whether the last token is odd."""
    lengths[:] = map(len, completion_ids)
    return [float(row[-1] % 2) for row in completion_ids]


class Trainer(trl.GRPOTrainer):
    """Clocks the sampling and what belongs to it, and a whole step from its batch to its update."""

    def _generate(self, *args, **kwargs):
        before = clock()
        result = super()._generate(*args, **kwargs)
        spent["sample_cpu_s"], spent["sample_wall_s"] = (b - a for a, b in zip(before, clock(), strict=True))
        return result

    def _generate_and_score_completions(self, *args, **kwargs):
        before = clock()
        result = super()._generate_and_score_completions(*args, **kwargs)
        spent["rollout_cpu_s"], spent["rollout_wall_s"] = (b - a for a, b in zip(before, clock(), strict=True))
        return result


class Turns(transformers.TrainerCallback):
    """Waits for a line before each step, and tells what the step took."""

    def on_step_begin(self, args, state, control, **_):
        if not sys.stdin.readline():
            sys.stdout.flush()
            os._exit(0)
        start[:] = clock()

    def on_step_end(self, args, state, control, **_):
        cpu, wall = (b - a for a, b in zip(start, clock(), strict=True))
        assert lengths == [shape["drawn"]] * shape["prompts"] * shape["group"], lengths
        # "rollout" lies inside a step only if its preparation of the batch does.
        assert cpu > spent["rollout_cpu_s"] > spent["sample_cpu_s"], (cpu, spent)
        told = {"cpu_s": cpu, "wall_s": wall, "train_cpu_s": cpu - spent["rollout_cpu_s"], **spent}
        told["train_wall_s"] = wall - spent["rollout_wall_s"]
        print(json.dumps(told), flush=True)
        spent.clear()


config = trl.GRPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=shape["prompts"] * shape["group"],
    gradient_accumulation_steps=1,
    num_generations=shape["group"],
    max_completion_length=shape["drawn"],
    generation_kwargs={"suppress_tokens": [0, 1, 2], "min_new_tokens": shape["drawn"]},
    max_steps=1_000_000,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    beta=0.0,
    num_iterations=1,
    temperature=1.0,
    gradient_checkpointing=False,
    logging_steps=1_000_000,
    save_strategy="no",
    report_to=[],
    use_cpu=not GPU,
    bf16=GPU,
    disable_tqdm=True,
)
trainer = Trainer(
    model=model,
    args=config,
    train_dataset=rows,
    reward_funcs=reward,
    processing_class=tokenizer,
    callbacks=[Turns()],
)
versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
print(json.dumps({"params": sum(p.numel() for p in model.parameters()), "versions": versions}), flush=True)
trainer.train()
