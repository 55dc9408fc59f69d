"""Validation, scoring and saving need the memory that is predicted for them: real models, traced in the same way."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from test_generation import Numbers
from tiny_models import CONFIGS, save_with_tokenizer
from transformers import AutoConfig, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from toolkit.config import parse_config
from toolkit.memory import census
from toolkit.memory.ledger import BESIDE_STEPS
from toolkit.memory.recording import Counter
from toolkit.memory.trace import PHASES, Trace
from toolkit.methods import METHODS
from toolkit.models.generation import classify, generate, losses
from toolkit.models.heads import set_head
from toolkit.models.loading import load_model
from toolkit.models.soft_prompts import base_model
from toolkit.runs import prediction
from toolkit.runs.prediction import Batches, predict_run, sequential_arguments, worst_batch
from toolkit.training.guards import check_saved
from toolkit.training.trainer import FineTuner

LENGTH, TARGET, ROWS = 40, 12, 3


def configured(folder: Path, method: str, *flags: str):
    return parse_config(
        METHODS[method],
        [
            *(
                "--use_cpu",
                "--output_dir",
                str(folder / "run"),
                "--save_strategy",
                "no",
                "--per_device_train_batch_size",
                "1",
            ),
            *("--max_length", str(LENGTH), "--gradient_accumulation_steps", "1"),
            *(
                "--per_device_eval_batch_size",
                str(ROWS),
                "--eval_strategy",
                "steps",
                "--eval_steps",
                "2",
                "--max_steps",
                "2",
            ),
            *flags,
        ],
    )


@contextmanager
def traced(trainer: FineTuner, peaks: dict[str, int], name: str):
    """Counts the peak of live tensors while open: model, optimizer state and what is allocated."""
    meter = Counter()
    trace = Trace(meter, device_type="cpu")
    census.label_model(trace, trainer.model)
    census.label_optimizer_state(trace, trainer.optimizer)
    meter.take_peak()
    with trace:
        yield
    peaks[name] = meter.take_peak()
    trace.close()


class Evaluations(TrainerCallback):
    """Traces the evaluation after the second step."""

    def __init__(self, peaks: dict[str, int]) -> None:
        self.peaks = peaks

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.open = traced(self.trainer, self.peaks, "evaluation")
            self.open.__enter__()

    def on_evaluate(self, args, state, control, **kwargs):
        self.open.__exit__(None, None, None)


def real_peaks(config, answer) -> dict[str, int]:
    """The peaks of a real run on the batches that the prediction takes; `answer` scores its model."""
    peaks: dict[str, int] = {}
    model_config = config.model_config
    if config.task.model_kind == "head":
        set_head(model_config, ["a", "b"], model_config.pad_token_id)
    model = config.method.attach(load_model(config.model, model_config, config.dtype, config.training))
    batch = worst_batch(config, model_config)
    data = Batches([batch] * 2)
    object.__setattr__(data, "validation", [worst_batch(prediction._as_evaluated(config), model_config)])
    callback = Evaluations(peaks)
    trainer = FineTuner(model, replace(config, training=sequential_arguments(config.training)), data, [callback])
    callback.trainer = trainer
    trainer.train()
    with traced(trainer, peaks, "scoring"):
        answer(model)
    trainer.save_model()
    row = worst_batch(prediction._as_evaluated(config), model_config)
    with traced(trainer, peaks, "saving"):
        check_saved(model, config, {name: tensor[:1] for name, tensor in row.items()})
    return peaks


def answers(config):
    """Answers the longest prompts with as many tokens as the flags allow."""
    length, target = config.data.max_length, config.data.max_target_length
    tokens = length if config.model_config.is_encoder_decoder else length - target
    prompts = [[5] * tokens, *[[5] * (tokens - 1)] * (ROWS - 1)]

    def answer(model):
        base_model(model).generation_config.eos_token_id = None
        generate(model, Numbers(), prompts, ROWS, target, config.data.get("num_beams"))

    return answer


TARGETS = ("--max_target_length", str(TARGET))


def model_flags(name: str, folder: Path) -> list[str]:
    if name == "embedded":
        return []
    return [
        "--model_name_or_path",
        str(save_with_tokenizer(AutoConfig.for_model(name, **CONFIGS[name]), folder / "model")),
    ]


def phases(config) -> dict[str, int]:
    ledger = predict_run(config)
    assert not [note for note in ledger.notes if "not predicted" in note]
    return {phase: ledger.phases[phase].allocated_peak_bytes for phase in BESIDE_STEPS}


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["embedded", "llama"])
def test_peaks_beside_the_steps_are_predicted(name, method, beams, tmp_path):
    config = configured(tmp_path, method, *TARGETS, "--num_beams", str(beams), *model_flags(name, tmp_path))
    assert phases(config) == pytest.approx(real_peaks(config, answers(config)), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "qlora", "ia3"])
def test_peaks_are_predicted_with_virtual_tokens_and_packed_weights(method, tmp_path):
    config = configured(tmp_path, method, *TARGETS, *model_flags("llama", tmp_path))
    assert phases(config) == pytest.approx(real_peaks(config, answers(config)), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "sequence_classification"])
def test_scoring_without_generation_is_predicted(task, tmp_path):
    rows = [{"text": f"a text of number {n}", "label": "ab"[n % 2]} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--task", task, "--dataset_name", str(tmp_path / "rows.jsonl")]
    config = configured(tmp_path, "lora", *model_flags("llama", tmp_path), *flags)
    score = classify if config.task.model_kind == "head" else losses
    prompts = [[5] * LENGTH, *[[5] * (LENGTH - 1)] * (ROWS - 1)]
    assert phases(config) == pytest.approx(
        real_peaks(config, lambda model: score(model, Numbers(), prompts, ROWS)), rel=0.01
    )


@pytest.mark.slow
def test_the_cache_at_the_end_of_a_long_answer_is_predicted(tmp_path):
    """The last step needs more than the first one, and more for each token of the answer."""
    flags = ("--max_length", "300", "--max_target_length", "290", "--loss_chunk_tokens", "8")
    config = configured(tmp_path, "lora", *model_flags("llama", tmp_path), *flags)
    predicted = phases(config)["scoring"]
    assert predicted == pytest.approx(real_peaks(config, answers(config))["scoring"], rel=0.01)
    keys_and_values = 2 * 2 * ROWS * 2 * 16 * 4  # of a token: layers, keys and values, rows, heads, size, float32
    shorter = replace(config, data=replace(config.data, max_length=200, max_target_length=190))
    assert predicted - phases(shorter)["scoring"] > 100 * keys_and_values


@pytest.mark.slow
def test_a_run_without_evaluation_has_no_such_phase(tmp_path):
    config = configured(tmp_path, "lora")
    config.training.eval_strategy = IntervalStrategy.NO
    assert {*predict_run(config).phases} - {*PHASES} == {"scoring", "saving"}


@pytest.mark.slow
def test_an_adapter_that_changes_its_base_is_checked_beside_a_second_base(tmp_path):
    plain, changed = (phases(configured(tmp_path, "lora", *flags)) for flags in ([], ["--init_lora_weights", "pissa"]))
    assert changed["saving"] - plain["saving"] == pytest.approx(3_625_472, rel=0.01)  # the embedded model in float32


@pytest.mark.slow
def test_what_fails_on_fake_tensors_becomes_a_note(tmp_path, monkeypatch):
    def refuse(*args):
        raise ValueError("no cache\nfor this")

    monkeypatch.setattr("toolkit.runs.beside_steps.generate_first_and_last", refuse)
    ledger = predict_run(configured(tmp_path, "lora"))
    assert "scoring" not in ledger.phases and "saving" in ledger.phases
    assert ledger.notes == ("scoring is not predicted for this model: ValueError: no cache for this",)


@pytest.mark.slow
def test_the_peak_beside_the_steps_counts_in_what_fits(tmp_path):
    """With beams, scoring needs more than a step of one short row."""
    config = configured(tmp_path, "lora", *TARGETS, "--num_beams", "8", *model_flags("llama", tmp_path))
    ledger = predict_run(config)
    assert ledger.peak_phase_name == "scoring" and ledger.needed_bytes >= ledger.phases["scoring"].allocated_peak_bytes
    assert not replace(ledger, budget_bytes=ledger.phases["backward"].allocated_peak_bytes).fits
