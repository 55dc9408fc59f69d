"""`footprint merge RUN_DIR`: merges an adapter into its base, to a model that transformers loads without PEFT."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from toolkit.config.start import check_name
from toolkit.console import say, table
from toolkit.distributed.launcher import without_secrets
from toolkit.errors import UserError
from toolkit.methods import METHODS, Method
from toolkit.runs.finished_run import FinishedRun
from toolkit.runs.model_folder import PROMPT
from toolkit.runs.scoring import own_test_rows
from toolkit.tasks.metrics import score_title
from toolkit.training.checkpoints import is_write_failure

SAMPLE = 16  # rows of the test split on which logits and scores are compared

# Largest root mean square of (merged - adapter) logits, relative to the spread of the adapter's logits. The sum of weight and
# update is rounded once, to 24 bits in fp32, 8 in bf16 or 11 in fp16, in each of some tens of layers. A quantized base multiplies
# in a shorter type than its dequantized weights, and LLM.int8() also rounds activations.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
TOLERANCE_4BIT, TOLERANCE_8BIT = 1e-1, 2e-1
SURVIVES = 0.5  # of the adapter's effect on the logits: with less, rounding has erased the fine-tuning


def merge(run_dir: Path, output_dir: Path | None = None, dtype: str = "auto") -> None:
    """Merges the run in `run_dir` into `output_dir` (default: its name with `-merged`), and compares logits and scores.

    `dtype` is the type of the merged weights; auto: the type of the run's base.

    Raises: UserError if the method cannot be merged, the merged model's logits do not agree, or the folder is not empty.
    """
    run = FinishedRun(run_dir)
    folder = output_dir.resolve() if output_dir else run_dir.resolve().with_name(f"{run_dir.resolve().name}-merged")
    _check_mergeable(run)
    check_name("--output_dir", folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is not empty; give a new folder")
    name = run.record["weights"] if dtype == "auto" else dtype
    sample = own_test_rows(run, SAMPLE)

    model = run.model
    assert isinstance(model, PeftModel)
    tuned, scores = run.logits(model, sample), run.score(model, sample)
    if run.is_quantized:
        del run.model, model
        base = _dequantized(run, getattr(torch, name))
        model = PeftModel.from_pretrained(base, run.path)
    model = model.to(getattr(torch, name)).eval()
    before = _untuned(run, model, sample)
    effect = (
        run.logits(model, sample) - before
    )  # in the merged weights' type, so that both effects have the same rounding
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.record['method']} cannot be merged: PEFT says: {reason}") from None
    after = run.logits(merged, sample)
    difference = _rms(after - tuned) / _rms(tuned - tuned.mean())
    survived = 1 - _rms((after - before) - effect) / _rms(effect) if effect.any() else None
    merged_scores = run.score(merged, sample)

    kinds = list(scores)
    rows = [[who, *(f"{s[k]:.4f}" for k in kinds)] for who, s in (("adapter", scores), ("merged", merged_scores))]
    table(f"Scores on {len(sample)} rows of the test split", ["model", *map(score_title, kinds)], rows)
    tolerance = _tolerance(run, name)
    say("logits", f"differ by {difference:.2g} of their spread (at most {tolerance:g} in {name}, else not merged)")
    if survived is None:
        say("tune", f"the adapter changes none of these logits in {name}: it has learned next to nothing")
    else:
        say("tune", f"{survived:.1%} of what the adapter does to the logits is in the merged weights")
        if not survived >= SURVIVES:
            raise UserError(_why_lost(run, name, survived))
    if not difference <= tolerance:
        raise UserError(
            f"the merged model's logits differ from the adapter's by {difference:.2g} of their spread, more than "
            f"{tolerance:g}: nothing was written; keep the adapter"
            + ("" if name == "float32" else ", or --dtype float32")
        )
    about = {
        "merged_from": without_secrets(run.record["command"]),  # runs of old versions kept them
        "base_model": run.base.model_name_or_path or "the tiny T5 that comes with footprint",
        "dtype": name,
        "dequantized": run.is_quantized,
        "rows": len(sample),
        "scores": {"adapter": scores, "merged": merged_scores},
        "logits_difference": difference,
        "tune_survived": survived,
        **{name: run.record[name] for name in PROMPT},
    }
    _save(merged, run, folder, about)
    say("folder", str(folder))


def _check_mergeable(run: FinishedRun) -> None:
    method = run.record["method"]
    if run.adapter is None:
        kept = "it is a whole model already" if any(run.path.glob("*.safetensors")) else "it trains nothing"
        raise UserError(f"{run.path}: {method} leaves no adapter, so there is nothing to merge: {kept}")
    if reason := METHODS.get(method, Method).merge_refusal(run.adapter):
        raise UserError(f"{run.path}: {method} cannot be merged: {reason}; use the run folder as it is")


def _why_lost(run: FinishedRun, dtype: str, survived: float) -> str:
    """Why the merged weights do not hold what the adapter does."""
    share = f"{max(survived, 0):.0%} of the tune"
    if dtype != "float32":
        return (
            f"rounding to {dtype} would leave {share}: the updates are smaller than the weights' last bit; "
            "merge in float32 (--dtype float32), or keep the adapter"
        )
    tied = run.model.get_base_model().config.get_text_config().tie_word_embeddings
    why = (
        "; the input embedding and the head share their weights, so an update of one would change both" if tied else ""
    )
    return f"the merged weights would hold {share}{why}; keep the adapter"


def _untuned(run: FinishedRun, model: PeftModel, sample: list[tuple[Any, str]]) -> torch.Tensor:
    """The logits without the adapter."""
    with model.disable_adapter():
        return run.logits(model, sample)


def _dequantized(run: FinishedRun, dtype: torch.dtype) -> Any:
    """The base with its quantized weights dequantized to `dtype`."""
    base = run.load_base().dequantize(dtype).to(dtype)
    # dequantize() does not reset these flags, and IA3 refuses to merge while they are set
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
    return base


def _rms(logits: torch.Tensor) -> float:
    return float(logits.square().mean().sqrt())


def _tolerance(run: FinishedRun, dtype: str) -> float:
    if run.base.load_in_8bit:
        return TOLERANCE_8BIT
    return max(TOLERANCE[dtype], TOLERANCE[run.record["weights"]], TOLERANCE_4BIT if run.base.load_in_4bit else 0.0)


def _save(model: Any, run: FinishedRun, folder: Path, about: dict[str, Any]) -> None:
    """Writes model, tokenizer and `merge.json` to a temporary folder and renames it to `folder`."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(temporary)
        run.prompt_tokenizer.tokenizer.save_pretrained(temporary)
        (temporary / "merge.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder)  # an empty folder is replaced
    except Exception as error:
        if not is_write_failure(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--output_dir {folder} cannot be written ({reason}); give a folder that can, on a disk with enough room"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
