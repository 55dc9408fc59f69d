"""Makes the embedded model: trains a tokenizer and a tiny T5 from scratch, on dialogues with their own sentence frames.

    python -m toolkit.embedded.pretrain --output_dir toolkit/embedded/model

The tasks are those of `toolkit.embedded.tasks`; the model never sees a summary. Batches come from a seeded generator, so on
one machine the same command gives the same weights.
"""

import argparse
import copy
import itertools
import math
import random
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import BatchEncoding, T5Config, T5ForConditionalGeneration, T5Tokenizer
from transformers.models.t5.modeling_t5 import T5Attention

from toolkit.embedded.dialogues import make_sample, make_samples
from toolkit.embedded.tasks import INSTRUCTIONS, QUESTIONS, echo, example, made_up_word

SENTINELS = 20


def make_vocabulary(size: int, seed: int) -> list[tuple[str, float]]:
    """Unigram pieces with their scores (log-probabilities): whole words of the text, then fragments for all other words.

    A word scores higher than its fragments, and a long fragment higher than short ones, so each word becomes as few pieces as
    possible.
    """
    rng = random.Random(f"tokenizer-{seed}")
    samples = make_samples("pretraining", 2000, seed) + make_samples("train", 1000, seed)
    text = " ".join(f"{sample.dialogue} {sample.summary}" for sample in samples)
    text += f" {INSTRUCTIONS} {' '.join(QUESTIONS.values())} Answer: yes" * 50
    counts = Counter(
        f"▁{word}" if space else word for space, word in re.findall(r"(^|\s)?([A-Za-z]+|[^A-Za-z\s])", text)
    )
    total = counts.total()
    words = {word: math.log(count / total) for word, count in counts.most_common(size * 3 // 5) if count >= 10}
    stems = [word.strip("▁").lower() for word in counts] + [made_up_word(rng) for _ in range(1000)]
    parts = Counter(
        stem[i : i + n] for stem in stems for n in (2, 3) for i in range(len(stem) - n + 1) if stem.isalpha()
    )
    fragments = {part: -20.0 - 1 / len(part) for part, _ in parts.most_common(size)}
    letters = dict.fromkeys(["▁", *string.printable.strip()], -21.0)
    # Each speaker's tag is one piece, with a score higher than that of any combination of other pieces.
    pieces = {f"▁#Person{i}#": -2.0 for i in (1, 2)} | words
    for piece, score in [*letters.items(), *fragments.items()]:
        if len(pieces) < size or piece in letters:
            pieces.setdefault(piece, score)
    return list(pieces.items())


def make_tokenizer(vocab_size: int, seed: int) -> T5Tokenizer:
    """A unigram tokenizer in T5's layout: special tokens, `vocab_size` pieces, sentinels."""
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + make_vocabulary(vocab_size, seed)
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=vocab, extra_ids=SENTINELS, model_max_length=512)


def make_model(tokenizer: T5Tokenizer) -> T5ForConditionalGeneration:
    """A T5 v1.1 with about a million parameters and tied embeddings."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    start_as_copier(model)
    return model


@torch.no_grad()
def start_as_copier(model: T5ForConditionalGeneration) -> None:
    """Initializes attention so that it copies, because the pretraining is too short to learn copying from scratch.

    Values pass nearly unchanged (v orthogonal (128, 128), o its transpose), and tokens attend to similar tokens (q = k), after
    Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers". In addition, the encoder's first head attends to
    the previous token and writes it into a separate subspace. Half of the decoder's cross-attention heads search this subspace
    for the token that was just written, and so find the token that follows it.
    """
    width = model.config.d_kv
    for name, module in model.named_modules():
        if isinstance(module, T5Attention):
            torch.nn.init.orthogonal_(module.v.weight)
            module.o.weight.copy_(module.v.weight.T * (1.5 if "EncDec" in name else 0.5))
            torch.nn.init.orthogonal_(module.q.weight, gain=0.3 if "EncDec" in name else 0.15)
            module.k.weight.copy_(module.q.weight)
            if module.has_relative_attention_bias:
                # T5's buckets: bucket n is n tokens back; in the encoder, bucket 16 + n is n tokens ahead.
                module.relative_attention_bias.weight[1, 0] += 6.0
                module.relative_attention_bias.weight[1 if module.is_decoder else 17, 1] += 6.0
    first = model.encoder.block[0].layer[0].SelfAttention
    before = torch.nn.init.orthogonal_(torch.empty(width, model.config.d_model))
    first.o.weight[:, :width] = before.T
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        for head in range(2):
            rows = slice(head * width, (head + 1) * width)
            attention.q.weight[rows] = 0.5 * first.v.weight[:width]
            attention.k.weight[rows] = 0.5 * before


def batches(tokenizer: T5Tokenizer, batch_size: int, seed: int, echoes: int, pool: int = 8) -> Iterator[BatchEncoding]:
    """Endless batches of padded (batch, tokens) tensors, with rows of similar length; the first `echoes` batches only copy."""
    rng = random.Random(f"pretraining-{seed}")
    for batch in itertools.count(0, pool):
        task = echo if batch < echoes else example
        rows = [task(make_sample("pretraining", rng), rng) for _ in range(pool * batch_size)]
        rows.sort(key=lambda row: len(row[0]))
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            sources, targets = zip(*chunk, strict=True)
            inputs = tokenizer(list(sources), padding=True, return_tensors="pt")
            labels = tokenizer(list(targets), padding=True, return_tensors="pt")
            inputs["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
            yield inputs


def train(
    model: T5ForConditionalGeneration,
    stream: Iterator[BatchEncoding],
    steps: int,
    learning_rate: float,
    keep: Callable[[], None],
) -> None:
    """Trains matrices with Muon and the rest with AdamW; the learning rate is constant, then linear to zero.

    It saves every 200 steps and prints the mean loss every 20 steps.
    """
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "shared" not in name and "bias" not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = 40

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, 2.5 * (steps - step) / steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    start, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        total += loss.item()
        if step % 200 == 0:
            keep()
        if step % 20 == 0:
            print(f"step {step}/{steps}: loss {total / 20:.3f}, {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0


def save(model: T5ForConditionalGeneration, tokenizer: T5Tokenizer, folder: Path) -> None:
    """Saves weights in float16, with a config that says float32, so that the model loads and computes in float32."""
    model.generation_config.max_new_tokens = 48
    copy.deepcopy(model).half().save_pretrained(folder)
    config = T5Config.from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where tokenizer and weights are written")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps")
    parser.add_argument("--echoes", type=int, default=60, help="first steps that only copy lines")
    parser.add_argument("--batch_size", type=int, default=16, help="rows a step")
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="peak of the schedule")
    parser.add_argument("--vocab_size", type=int, default=900, help="pieces that the tokenizer learns")
    parser.add_argument("--seed", type=int, default=0, help="of the text, the tasks and the weights")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(args.vocab_size, args.seed)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(
        model,
        batches(tokenizer, args.batch_size, args.seed, args.echoes),
        args.steps,
        args.learning_rate,
        lambda: save(model, tokenizer, args.output_dir),
    )
    save(model, tokenizer, args.output_dir)


if __name__ == "__main__":
    main()
