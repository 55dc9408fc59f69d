"""The embedded default: a task and a model inside the package, so that a first run needs no hub, no GPU and no download.

`make_dialogues` writes small dialogues with summaries. `MODEL_DIR` holds a tiny T5 with its tokenizer, which
`toolkit.embedded.pretrain` made. The model has learned to find and copy parts of such dialogues, but not to summarize them. So
its first summaries are bad, and LoRA or full fine-tuning makes them visibly better within a minute. The weights are committed
instead of made on first use, because that takes minutes and because the numbers in tests and README belong to exactly one model.
"""

from pathlib import Path

from toolkit.embedded.dialogues import make_dialogues

MODEL_DIR: Path = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "make_dialogues"]
