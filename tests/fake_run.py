"""Synthetic run directories with the shape of real ones: planted learning, forgetting and stability gaps."""

import json
import zlib

import numpy as np

from jaxcl import metrics

DOMAINS = ("prose", "code", "headers")
FIRST = {"prose": 5.5, "code": 5.7, "headers": 5.9}
FLOOR = {"prose": 1.9, "code": 1.5, "headers": 1.1}
BATCH_TOKENS = 4096


def config(*, label="er + reptile", seed=0, lr=3e-3, fraction=0.25, mode="replace", method="", steps=250):
    stages = [{"name": domain, "mixture": {domain: 1.0}} for domain in DOMAINS]
    return {
        "label": label,
        "seed": seed,
        "model": {"name": "transformer", "preset": "tiny", "vocab": 320},
        "tokenizer": {"name": "byte"},
        "stream": {
            "length": 256,
            "batch": 16,
            "steps": steps,
            "stages": stages,
            "replay": {"fraction": fraction, "mode": mode, "over": "earlier"},
        },
        "method": method,
        "schedule": {"name": "infinite", "peak": lr},
        "evaluation": {"every": 10, "rows": 16},
    }


def losses(step, steps, *, effective_lr, fraction, rng):
    """Returns {domain: loss} with forgetting that shrinks with replay and a bump after each boundary."""
    rate = 6.0 * effective_lr / 3e-3
    found = {}
    for i, domain in enumerate((*DOMAINS, "general")):
        progress = np.clip((step - i * steps) / steps, 0, 1) if i < len(DOMAINS) else min(1.0, step / steps)
        own = FLOOR.get(domain, 2.4) + (FIRST.get(domain, 5.8) - FLOOR.get(domain, 2.4)) * np.exp(-rate * progress)
        before = 0.25 * (1 - np.exp(-3 * min(step, i * steps) / steps))  # what earlier tasks give to a later one
        value = own - before * np.exp(-rate * progress)
        for k in range(i + 1, len(DOMAINS)):  # later stages
            since = (step - k * steps) / steps
            if since > 0:
                lasting = (0.9 - 1.6 * fraction) * (1 - np.exp(-4 * since)) * effective_lr / 3e-3
                value += lasting / (k - i) + 0.5 * effective_lr / 3e-3 * since / 0.05 * np.exp(1 - since / 0.05)
        found[domain] = float(value + 0.004 * rng.normal())
    return found


def alignment(boundary):
    """Returns cosines that fall with the boundaries, down to below zero."""
    domains = (*DOMAINS, "general")
    return {
        a: {b: 1.0 if a == b else round(0.5 - 0.25 * (boundary + 1) + 0.01 * (i + j), 4) for j, b in enumerate(domains)}
        for i, a in enumerate(domains)
    }


def sources():
    """Returns what `jaxcl.data.provenance` says of the domains."""

    def split(name, documents, rows):
        size = {"documents": documents, "rows": rows, "tokens": 256 * rows, "bytes": 250 * rows}
        return {**size, "fingerprint": f"{zlib.crc32(name.encode()):08x}" * 8}

    return {
        domain: {
            "source": {"name": "embedded", "domain": domain, "max_bytes": 3_000_000},
            "licence": None if domain == "headers" else f"licence of {domain}",
            "tokenizer": {"name": "byte", "vocab": 259, "fingerprint": "0" * 64},
            "train": split(domain, 1234, 4000 * (i + 1)),
            "held_out": split(f"held-out {domain}", 56, 78),
        }
        for i, domain in enumerate(DOMAINS)
    }


def records(options, *, stop=None, every=10):
    """Yields the records of a run up to step `stop`."""
    steps, stream = options["stream"]["steps"], options["stream"]
    total = steps * len(DOMAINS)
    noise = zlib.crc32(options["label"].encode())
    rng = np.random.default_rng([options["seed"], noise])
    text = options["method"] if isinstance(options["method"], str) else ""
    keep = float(text.split("keep=")[1].split(")")[0].split(",")[0]) if "keep=" in text else 1.0
    luck = 0.03 * np.random.default_rng(options["seed"]).normal()  # what runs of one seed share
    peak, fraction = options["schedule"]["peak"], stream["replay"]["fraction"]
    counts = {
        domain: dict.fromkeys(("new_rows", "new_tokens", "replayed_rows", "replayed_tokens"), 0) for domain in DOMAINS
    }
    for step in range(total + 1):
        if stop is not None and step > stop:
            return
        task = min((step - 1) // steps, len(DOMAINS) - 1) if step else -1
        if step:
            replayed = int(BATCH_TOKENS * fraction) if task else 0
            counts[DOMAINS[task]]["new_tokens"] += BATCH_TOKENS - replayed
            for old in range(task):
                counts[DOMAINS[old]]["replayed_tokens"] += replayed // task
            local = (step - 1) % steps
            lr = peak * min(1.0, (local + 1) / (0.05 * steps)) * (1.0 if task < 2 else 1 - 0.9 * local / steps)
            loss = losses(step, steps, effective_lr=peak * keep, fraction=fraction, rng=rng)[DOMAINS[task]]
            yield {
                "kind": "train",
                "step": step,
                "task": task,
                "stage": DOMAINS[task],
                "loss": loss + 0.1 * rng.normal(),
                "lr": lr,
                "grad_norm": float(0.6 + 0.1 * rng.normal() + 0.8 * np.exp(-local / 6)),
                "weight": float(BATCH_TOKENS),
                "reptile/distance": float(abs(rng.normal())) if keep < 1 else 0.0,
                "time": {"step_s": 0.11, "tokens_per_s": 37000.0 + 900.0 * rng.normal()},
            }
        boundary = step // steps - 1 if step % steps == 0 else None
        if step % every == 0 or boundary is not None:
            loss = losses(step, steps, effective_lr=peak * keep, fraction=fraction, rng=rng)
            loss = {domain: value + luck for domain, value in loss.items()}
            bits = {domain: value / np.log(2) for domain, value in loss.items()}
            about = {"task": task, "boundary": boundary, "loss": loss, "bits_per_byte": bits}
            if boundary is not None:
                about["alignment"] = alignment(boundary)
            yield {"kind": "eval", "step": step, **about}
        if step % 50 == 0:
            yield {"kind": "ledger", "step": step, "sources": counts}
        if step == 301:
            yield {"kind": "event", "step": step, "event": "skip", "message": "gradient norm 41.2 is 12 x its average"}
        if step == 400:
            yield {"kind": "event", "step": step, "event": "restore", "message": "continued from checkpoint 400"}


def make(folder, *, stop=None, every=10, mfu=False, **options):
    """Writes a run directory and returns it; with `mfu` that of a device whose peak is 1 TFLOP/s."""
    folder.mkdir(parents=True)
    chosen = config(**options)
    (folder / "config.json").write_text(json.dumps(chosen))
    facts = {"parameters": 1_123_456, "flops_per_token": 8_000_000, "devices": "1 x cpu", "mesh": {}}
    facts["sources"] = sources()
    about = {"id": folder.name, "finished": stop is None, "facts": facts, "versions": {"jax": "0.10.2"}}
    (folder / "run.json").write_text(json.dumps(about))
    writer = metrics.Jsonl(folder / "metrics.jsonl")
    for record in records(chosen, stop=stop, every=every):
        if mfu and record["kind"] == "train":
            record["time"]["mfu"] = record["time"]["tokens_per_s"] * facts["flops_per_token"] / 1e12
        writer.write(record)
    writer.close()
    return folder


def sweep(folder, seeds=(0, 1, 2)):
    """Writes runs of four variants, among them the learning-rate-matched control of the Reptile one."""
    variants = (
        {"label": "plain", "fraction": 0.0},
        {"label": "replay 25 %"},
        {"label": "replay 25 % + reptile", "method": "reptile(every=10, keep=0.5)"},
        {"label": "replay 25 %, half lr", "lr": 1.5e-3},
    )
    return [
        make(folder / f"{i}-seed{seed}", seed=seed, every=25, **variant)
        for i, variant in enumerate(variants)
        for seed in seeds
    ]


MODES = ("hard", "soft", "gumbel")
PROBLEMS = ("add", "mnns")
BASELINES = {"add": {"majority": 0.136, "parity": 0.257}, "mnns": {"majority": 0.41}}


def accuracies(domain, mode, step, total, seed=0):
    """Returns {"greedy": p, "sample": {k: p}}: a planted rise with the steps, other for each domain, mode and seed."""
    rise = 0.3 * min(1.0, step / total) + 0.01 * seed
    base = 0.35 + 0.05 * MODES.index(mode) + 0.07 * PROBLEMS.index(domain)
    greedy = round(base + rise, 4)
    return {"greedy": greedy, "sample": {str(k): round(1 - (1 - base - 0.8 * rise) ** k**0.3, 4) for k in (1, 4, 16)}}


def thinking_records(options, *, stop=None, every=20, thoughts=4, domains=PROBLEMS[:1]):
    """Yields the records of a run that learns by rollouts, up to step `stop`."""
    stages, steps, seed = options["stream"]["stages"], options["stream"]["steps"], options["seed"]
    rng, total = np.random.default_rng(seed), steps * len(stages)
    for step in range(total + 1 if stop is None else min(stop, total) + 1):
        task = min((step - 1) // steps, len(stages) - 1) if step else -1
        if step:
            record = {"kind": "train", "step": step, "task": task, "stage": stages[task]["name"], "lr": 1e-4}
            record |= {"loss": float(rng.normal()), "grad_norm": 0.5, "weight": 512.0}
            clock = {"step_s": 0.5, "tokens_per_s": 900.0}
            if stages[task].get("learn", "rl") == "rl":
                reward = 0.3 + 0.3 * step / total
                record |= {"reward": reward, "solved": min(1.0, reward + 0.2), "signal": 0.8 - 0.3 * step / total}
                record |= {"thoughts": float(thoughts), "stopped": 0.9, "ended": 0.95, "busy": 0.7, "length": 9.0}
                record |= {"failed": int(step == total), "entropy": 2.0 - step / total}
                clock |= {"sample_s": 0.3, "verify_s": 0.05}
            yield record | {"time": clock}
        boundary = step // steps - 1 if step % steps == 0 else None
        if step % every == 0 or boundary is not None:
            own = options["policy"]["name"]
            measured = MODES if boundary is not None else (own,)
            told = {d: {m: accuracies(d, m, step, total, seed) for m in measured} for d in domains}
            loss = {d: 2.0 - step / total + 0.1 * i for i, d in enumerate(domains)}
            record = {"kind": "eval", "step": step, "task": task, "boundary": boundary, "loss": loss}
            record |= {"bits_per_byte": {}, "inference": told}
            record["accuracy"] = {d: table[own]["greedy"] for d, table in told.items()}
            if boundary is not None:
                falling = [1.5 - step / total - 0.1 * t for t in range(thoughts)]
                record["entropy"] = {d: dict.fromkeys(MODES, falling) for d in domains}
                record["drift"] = {d: {m: loss[d] + 0.01 * i for i, m in enumerate(MODES)} for d in domains}
            yield {**record, "time": {"eval_s": 1.0}}


def make_thinking(
    folder, *, domains=PROBLEMS[:1], warm=True, steps=60, label="soft rloo", policy="soft", seed=0, **options
):
    """Writes a run that learns to answer by rollouts, with `warm` after a supervised stage; see thinking_records."""
    stages = [{"name": f"learn {domain}", "mixture": {domain: 1.0}} for domain in domains]
    if warm:
        stages.insert(0, {"name": "imitate", "mixture": {domains[0]: 1.0}, "learn": "csft"})
    chosen = {"label": label, "seed": seed, "policy": {"name": policy}, "objective": "rloo", "rollout": {"group": 16}}
    chosen |= {"stream": {"steps": steps, "stages": stages}, "schedule": {"peak": 1e-4}}
    facts = {"baselines": {d: BASELINES[d] for d in domains}, "problems": dict.fromkeys(domains, 256)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(chosen))
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "facts": facts}))
    writer = metrics.Jsonl(folder / "metrics.jsonl")
    for record in thinking_records(chosen, domains=domains, **options):
        writer.write(record)
    writer.close()
    return folder
