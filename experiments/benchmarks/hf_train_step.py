"""The peer of train_step.py: one training step of Hugging Face Llama on torch, whenever a line arrives on stdin.

Needs torch and transformers only, in an environment of its own. The argument is the shape as JSON.
"""

import ctypes
import json
import sys
import time

import torch
import transformers

shape = json.loads(sys.argv[1])
if shape.pop("keep_pages"):  # the options of glibc's mallopt(3) that jaxcl/allocator.py sets
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):
        ctypes.CDLL(None).mallopt(parameter, value)
torch.manual_seed(0)
torch.set_num_threads(1)
config = transformers.LlamaConfig(
    vocab_size=shape["vocab"],
    hidden_size=shape["embed"],
    intermediate_size=shape["mlp"],
    num_hidden_layers=shape["layers"],
    num_attention_heads=shape["heads"],
    num_key_value_heads=shape["heads"],
    max_position_embeddings=shape["length"],
    tie_word_embeddings=True,
    use_cache=False,
    attn_implementation="sdpa",  # torch's fused attention, the fastest that runs on a CPU
)
model = transformers.LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
tokens = torch.randint(0, shape["vocab"], (shape["rows"], shape["length"]))
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
print(json.dumps({"params": sum(p.numel() for p in model.parameters()), "versions": versions}), flush=True)
for _ in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({"loss": value, "cpu_s": cpu, "wall_s": wall}), flush=True)
