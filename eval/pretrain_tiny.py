"""Pre-trains the embedded base `molora/tiny` on the general synthetic skills.

    python -m eval.pretrain_tiny --start molora/assets/tiny --steps 2560 --lr 1.2e-3 --cooldown 0.5 \\
        --out molora/assets/tiny_2

Without --start the weights begin at random. Writes the model, its byte-level tokenizer and a model card to --out;
settings, losses, times and exact match per skill to --result. Every --save-every steps it saves where it is beside
--out: the same command goes on from there, as if it had not been broken off. Set MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ to 8589934592 as `make` does: with the defaults of glibc the same run takes three times as long.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eval.pretrain_tiny_items import (
    BOS,
    EOS,
    FIRST_BYTE,
    PAD,
    POOL,
    SKILLS,
    SPELT,
    Item,
    batches,
    encode,
    held_out,
)
from molora.data.synthetic import generate

SPECIALS = ("<pad>", "<bos>", "<eos>")
MAX_LENGTH = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token 3 + b for each byte b, after the three special tokens; <bos> opens every text."""
    vocab = {token: i for i, token in enumerate(SPECIALS)}
    vocab |= {char: byte + FIRST_BYTE for byte, char in bytes_to_unicode().items()}
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
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses, logits.argmax(-1) == labels, labels != -100


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, pairs: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) pairs whose greedy answer is exact.

    An answer is greedy-exact if and only if every target token is the most likely one after the true ones.
    """
    _, hits, mask = token_losses(model, *collate([(0, *encode(*pair)) for pair in pairs]))
    return (hits | ~mask).all(1).float().mean().item()


def scores(model: LlamaForCausalLM, n: int) -> dict[str, list[float | None]]:
    """Exact match on `n` held-out items of each skill: as they come, and in any characters where the skill has such."""
    return {
        skill.name: [
            exact_match(model, [(x["prompt"], x["target"]) for x in generate(skill.name, n, 0, "eval")]),
            None if skill.name in SPELT else exact_match(model, held_out(skill, n, 0)),
        ]
        for skill in SKILLS
    }


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate: linear warm-up, constant, then linear down to zero over the last part."""
    up = min(1.0, (step + 1) / args.warmup)
    down = min(1.0, (args.steps - step) / (args.cooldown * args.steps))
    return args.lr * min(up, down)


class Pretraining:
    """Model, optimiser and what a run has counted so far; `save` and `load` move all of it to a file and back."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.model = LlamaForCausalLM.from_pretrained(args.start) if args.start else new_model(args)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        kept = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
        self.count: dict[str, Any] = {
            "step": 0,
            "tokens": 0,
            "loss": 3.0,
            "wall_s": 0.0,
            "cpu_s": 0.0,
            "log": [],
        }
        self.running = [3.0] * len(SKILLS)  # mean loss of an answer of each skill
        self.weights = [1.0] * len(SKILLS)  # harder skills are drawn more often

    def save(self, path: Path) -> None:
        """Replaces the file at once."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "count": self.count,
        }
        new = path.with_suffix(".new")
        torch.save({**state, "running": self.running, "weights": self.weights}, new)
        new.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a saved file."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.count, self.running, self.weights = state["count"], state["running"], state["weights"]

    def step(self, items: list[Item]) -> None:
        """One step of the optimiser."""
        wall, cpu, count = time.time(), time.process_time(), self.count
        for group in self.optimizer.param_groups:
            group["lr"] = rate(count["step"], self.args)
        losses, _, mask = token_losses(self.model, *collate(items))
        loss = losses.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {count['step']}")
        count["loss"] += 0.02 * (loss.item() - count["loss"])
        for (skill, _, _), value in zip(items, losses.detach().sum(1).tolist(), strict=True):
            self.running[skill] += 0.02 * (value - self.running[skill])
        self.weights[:] = [0.3 + min(value, 3.0) ** 0.5 for value in self.running]
        count["tokens"] += sum(len(prompt) + len(target) for _, prompt, target in items)
        count["wall_s"] += time.time() - wall
        count["cpu_s"] += time.process_time() - cpu
        count["step"] += 1

    def note(self) -> None:
        """Prints and keeps a line of the log."""
        count = self.count
        line = {"step": count["step"], "loss": round(count["loss"], 4), "tokens": count["tokens"]}
        line |= {"lr": rate(count["step"] - 1, self.args)}
        line |= {key: round(count[key], 1) for key in ("wall_s", "cpu_s")}
        print(json.dumps(line), flush=True)
        count["log"].append(line)


def pretrain(run: Pretraining, saved: Path) -> None:
    """Trains to the end, from the saved state where there is one."""
    if saved.exists():
        run.load(saved)
    args, start = run.args, run.count["step"]
    for items in batches(args.seed, start, run.weights, args.batch):
        if run.count["step"] == args.steps:
            return
        run.step(items)
        if run.count["step"] % args.log_every == 0 or run.count["step"] == args.steps:
            run.note()
        if run.count["step"] % args.save_every == 0:
            run.save(saved)
            run.model.save_pretrained(args.out)


def write_card(out: Path, result: dict) -> None:
    """Writes the model card README.md of the folder from the record of the run."""
    settings, shares = result["settings"], result["exact_match"]
    million, cpu, wall = result["tokens"] / 1e6, result["cpu_s"] / 60, result["wall_s"] / 60
    origin = (
        f"Trained on from the weights in `{settings['start']}`"
        if settings["start"]
        else "Trained from scratch"
    )
    threads = "one thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    rows = "\n".join(
        f"| `{skill.name}` | {skill.description} | {' | '.join(map(_percent, shares[skill.name]))} |"
        for skill in SKILLS
    )
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# molora/tiny, version 2

A byte-level Llama of {result["parameters"]:,} parameters for demos and tests without a download: {settings["layers"]} layers,
width {settings["width"]}, {settings["width"] // 32} heads. It answers puzzles on characters and numbers such as
`reverse(hello)=olleh` and nothing else; it knows no language. It has met every printable ASCII character in
answers; other bytes have untrained embeddings. Version 1 had met letters, digits, space and `"(),=` only.

{origin}
by `eval/pretrain_tiny.py` on the general skills below (`molora.data.synthetic`), never on the demo tasks:
seed {settings["seed"]}, {settings["steps"]} steps of {settings["batch"]} items, {million:.1f}M tokens, loss on
answers only, float32, {cpu:.0f} CPU minutes of {threads} ({wall:.0f} minutes of wall
time). Final training loss: {result["loss"]:.4f} nats per answer token.

Tokens: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, 3 + b for byte b. The tokenizer puts `<bos>` before every text; an answer
ends with `<eos>`.

Greedy exact match on 200 held-out items, %: of the skill as it is, and with letters of its texts replaced by
punctuation.

| skill | answer | as it is | any characters |
|---|---|---|---|
{rows}
"""
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from, of the same size")
    parser.add_argument(
        "--result", type=Path, help="default: eval/results/pretrain_NAME.json, of --out's name"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--cooldown", type=float, default=0.3, help="share of the steps")
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ff", type=int, default=432)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=20 * POOL, help=f"steps, a multiple of {POOL}")
    args = parser.parse_args()
    if args.save_every % POOL:
        parser.error(f"--save-every must be a multiple of {POOL}")

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(args.out)
    run, saved = Pretraining(args), args.out.with_suffix(".unfinished")
    pretrain(run, saved)
    run.model.save_pretrained(args.out)
    result = {
        "settings": {k: v.as_posix() if isinstance(v, Path) else v for k, v in vars(args).items()},
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": args.threads,
        },
        "skills": [s.name for s in SKILLS],
        "parameters": run.model.num_parameters(),
        "exact_match": scores(run.model, 200),
        **{key: run.count[key] for key in ("wall_s", "cpu_s", "tokens", "loss", "log")},
    }
    path = args.result or Path("eval/results", f"pretrain_{args.out.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_card(args.out, result)
    saved.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
