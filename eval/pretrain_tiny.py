"""Pre-trains the embedded base `molora/tiny` on the general synthetic skills, on one CPU core.

    python eval/pretrain_tiny.py --out molora/assets/tiny

Writes the model, its byte-level tokenizer and a model card to --out; settings, losses, times and exact match
per skill to --result. Set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 8589934592 as `make` does: with
the defaults of glibc the same run takes three times as long.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from molora.data.synthetic import GENERATORS, generate, split_of

SPECIALS = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)
SKILLS = [generator for generator in GENERATORS.values() if generator.general]
MAX_LENGTH = 256

Item = tuple[int, list[int], list[int]]  # skill index, prompt ids, target ids


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token 3 + b for each byte b, after the three special tokens; <bos> opens every text."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    vocab |= {char: byte + len(SPECIALS) for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def new_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with one token per byte and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + 256,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        intermediate_size=args.ff,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def encode(prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of an item, the same as the tokenizer's but without its overhead."""
    offset = len(SPECIALS)
    return [BOS, *(b + offset for b in prompt.encode())], [*(b + offset for b in target.encode()), EOS]


def draw(rng: random.Random, weights: list[float], n: int) -> list[Item]:
    """`n` items of the train split, skills drawn by weight."""
    items: list[Item] = []
    while len(items) < n:
        skill = rng.choices(range(len(SKILLS)), weights)[0]
        prompt, target = SKILLS[skill].item(rng)
        if split_of(prompt) == "train":
            items.append((skill, *encode(prompt, target)))
    return items


def batches(rng: random.Random, weights: list[float], size: int, pool: int = 16):
    """Batches of similar length without end: `pool` batches are drawn at once and sorted by length."""
    while True:
        items = sorted(draw(rng, weights, size * pool), key=lambda item: len(item[1]) + len(item[2]))
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        rng.shuffle(chunks)
        yield from chunks


def collate(items: list[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both (batch, seq), right-padded; labels are -100 outside the target."""
    longest = max(len(prompt) + len(target) for _, prompt, target in items)
    ids = torch.full((len(items), longest), PAD)
    labels = torch.full((len(items), longest), -100)
    for row, (_, prompt, target) in enumerate(items):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        labels[row, len(prompt) : end] = torch.tensor(target)
    return ids, labels


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor):
    """(losses, hits, mask), each (batch, seq - 1), of predicting every token from those before it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1]
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return losses, logits.argmax(-1) == labels, labels != -100


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, n: int) -> dict[str, float]:
    """Share of held-out items whose greedy answer is exact, per skill.

    An answer is greedy-exact if and only if every target token is the most likely one after the true ones.
    """
    scores = {}
    for skill in SKILLS:
        items = [(0, *encode(x["prompt"], x["target"])) for x in generate(skill.name, n, 0, "eval")]
        _, hits, mask = token_losses(model, *collate(items))
        scores[skill.name] = (hits | ~mask).all(1).float().mean().item()
    return scores


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate: linear warm-up, constant, then linear down to zero over the last part."""
    up = min(1.0, (step + 1) / args.warmup)
    down = min(1.0, (args.steps - step) / (args.cooldown * args.steps))
    return args.lr * min(up, down)


def pretrain(model: LlamaForCausalLM, args: argparse.Namespace) -> dict:
    """Trains in place; returns the record of the run."""
    rng = random.Random(f"pretrain-{args.seed}")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    weights = [1.0] * len(SKILLS)  # changed in place: harder skills are drawn more often
    running = [3.0] * len(SKILLS)
    wall, cpu, seen, mean, log = time.time(), time.process_time(), 0, 3.0, []
    for step, items in enumerate(batches(rng, weights, args.batch), start=0):
        if step == args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        losses, _, mask = token_losses(model, *collate(items))
        loss = losses.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        seen += sum(len(prompt) + len(target) for _, prompt, target in items)
        mean += 0.02 * (loss.item() - mean)
        for (skill, _, _), value in zip(items, losses.detach().sum(1).tolist(), strict=True):
            running[skill] += 0.02 * (value - running[skill])
        weights[:] = [0.3 + min(value, 3.0) ** 0.5 for value in running]
        if step % args.log_every == 0 or step == args.steps - 1:
            line = {"step": step, "loss": round(mean, 4), "tokens": seen, "lr": rate(step, args)}
            line |= {"wall_s": round(time.time() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
            print(json.dumps(line), flush=True)
            log.append(line)
        if step and step % args.save_every == 0:
            scores = exact_match(model, 50)
            print(
                json.dumps({k: round(v, 2) for k, v in sorted(scores.items(), key=lambda x: x[1])}),
                flush=True,
            )
            model.save_pretrained(args.out)
    return {
        "wall_s": log[-1]["wall_s"],
        "cpu_s": log[-1]["cpu_s"],
        "tokens": seen,
        "loss": log[-1]["loss"],
        "log": log,
    }


def write_card(out: Path, result: dict) -> None:
    """Writes the model card README.md of the folder from the record of the run."""
    settings, scores = result["settings"], result["exact_match"]
    million, cpu, wall = result["tokens"] / 1e6, result["cpu_s"] / 60, result["wall_s"] / 60
    rows = "\n".join(
        f"| `{skill.name}` | {skill.description} | {100 * scores[skill.name]:.1f} |" for skill in SKILLS
    )
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# molora/tiny

A byte-level Llama of {result["parameters"]:,} parameters for demos and tests without a download: {settings["layers"]} layers,
width {settings["width"]}, {settings["width"] // 32} heads. It answers puzzles on characters and numbers such as
`reverse(hello)=olleh` and nothing else; it knows no language. It has met lower-case and capital letters, digits,
space and `"(),=`; other bytes have untrained embeddings, so answers that need them are hard to learn.

Trained from scratch by `eval/pretrain_tiny.py` on the general skills below (`molora.data.synthetic`), never on
the demo tasks: seed {settings["seed"]}, {settings["steps"]} steps of {settings["batch"]} items, {million:.1f}M tokens, loss on
answers only, bfloat16 autocast over float32 weights, {cpu:.0f} minutes on one CPU core ({wall:.0f} minutes of wall
time). Final training loss: {result["loss"]:.4f} nats per answer token.

Tokens: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, 3 + b for byte b. The tokenizer puts `<bos>` before every text; an answer
ends with `<eos>`.

| skill | answer | greedy exact match on 200 held-out items, % |
|---|---|---|
{rows}
"""
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--result", type=Path, default=Path("eval/results/pretrain_tiny.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--cooldown", type=float, default=0.3, help="share of the steps")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ff", type=int, default=432)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = new_model(args)
    args.out.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(args.out)
    record = pretrain(model, args)
    model.save_pretrained(args.out)
    scores = exact_match(model, 200)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    environment = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    result = {
        "settings": settings,
        "environment": environment,
        "skills": [s.name for s in SKILLS],
        "parameters": model.num_parameters(),
        "exact_match": scores,
        **record,
    }
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n")
    write_card(args.out, result)


if __name__ == "__main__":
    main()
