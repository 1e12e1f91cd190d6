"""Continue a released Llama, Mistral or Qwen on your own text, with 5 % replay of older text.

Claim:    any checkpoint of these families trains on with its own tokenizer and goes back to `transformers`.
Command:  python -m jaxcl.main --config=configs/cpt_hf.py --config.model.checkpoint=/path/to/hf_model --workdir=runs/new
          python -m jaxcl.hf export runs/new out
Expected: report.html in the workdir; `out` loads with AutoModelForCausalLM.from_pretrained.

Without further options it trains on text that every Python installation has. Yours:
  --config.sources="{'old': {'name': 'jsonl', 'path': 'old/*.jsonl.zst'}, 'new': {'name': 'text', 'path': 'new/*.txt'}}"
Memory: 16 bytes a parameter (float32 masters, gradient, two moments), cut over --config.mesh.fsdp=N devices;
--config.adapter=lora trains an adapter alone.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0

    # The tokenizer is that of the checkpoint unless config.tokenizer names another.
    config.model = ConfigDict({"checkpoint": "", "compute_dtype": "bfloat16", "remat": "full"})
    config.sources = ConfigDict(
        {
            "old": {"name": "embedded", "domain": "prose", "max_bytes": 3_000_000},
            "new": {"name": "embedded", "domain": "headers", "max_bytes": 3_000_000},
        }
    )
    config.packing = ConfigDict({"length": 1024})

    config.stream = ConfigDict({"batch": 8, "steps": 200})
    config.stream.stages = ({"name": "new", "mixture": {"new": 0.95, "old": 0.05}},)

    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.1, "clip": 1.0})
    # Re-warmed to a tenth of a usual pre-training rate; it stays at `constant` for whatever comes next.
    config.schedule = ConfigDict({"name": "infinite", "peak": 3e-5, "constant": 2e-5, "warmup": 20, "cooldown": 100})
    config.guard = ConfigDict({"spike": 20.0})

    config.evaluation = ConfigDict({"every": 50, "rows": 16})
    config.checkpoint = ConfigDict({"every_steps": 100, "every_minutes": 10.0, "keep": 2})
    return config
