"""The benchmarks of two write-ups: their flags, and the comparison with the published figures."""

import sys

import pytest
from comparison_folder import write_comparison
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import dialogsum
import financial_phrasebank
import published

from toolkit.compare.command import compare
from toolkit.compare.plan import new_plan


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Runs `redo` up to where the comparison would start; returns its methods and each method's flags."""

    def start(benchmark, *argv):
        calls = []
        monkeypatch.setattr(published, "compare", lambda args: calls.append(args) or 0)
        published.redo("x", benchmark.METHODS, benchmark.SETTINGS, ["--output_dir", str(tmp_path / "x"), *argv])
        (args,) = calls
        # raises for flags that cannot be right
        plan = new_plan(args.output_dir, args.methods, args.seeds, args.launch, args.flags)
        return {run.method: " ".join(run.argv) for run in plan.runs if run.seed == 0}

    return start


def test_the_settings_of_the_write_ups_are_accepted_and_each_reaches_its_methods(started):
    flags = started(dialogsum)
    assert set(flags) == set(dialogsum.METHODS)
    assert "--model_name_or_path google/flan-t5-base" in flags["in_context"] and "--optim" not in flags["in_context"]
    assert "--lora_r 32" in flags["lora"] and "--lora_target_modules q v" in flags["lora"]
    assert "--optim prodigy" in flags["full"] and "--lora_r" not in flags["full"]
    flags = started(financial_phrasebank, "--dataset_name", "rows.txt")
    assert all("--task classification" in one and "bigscience/mt0-large" in one for one in flags.values())
    assert "--num_virtual_tokens 20" in flags["prefix_tuning"] and "--encoder_hidden_size 128" in flags["p_tuning"]


def test_the_users_flags_win_and_flags_of_methods_left_out_are_left_out(started):
    flags = started(dialogsum, "--methods", "full,lora", "--lora_r", "4", "--max_steps", "2")
    assert "--lora_r 4" in flags["lora"] and "--lora_r 32" not in flags["lora"]
    assert set(started(dialogsum, "--methods", "full")) == {"full"}


def test_published_figures_are_shown_next_to_ours_with_the_differences(tmp_path, monkeypatch):
    import argparse

    folder = write_comparison(tmp_path / "c", methods=("full", "lora", "ia3"), seeds=1)
    (folder / "runs" / "lora-0" / "config.yaml").write_text("lora_r: 4\nlora_target_modules: [q, v]\nnum: [1, 2]\n")
    show = argparse.Namespace(output_dir=folder, methods=None, seeds=3, launch=None, flags=[], show=True)
    assert compare(show) == 1  # the last run is missing
    text = published.beside(folder, dialogsum.PUBLISHED, dialogsum.THEIRS, dialogsum.SOURCE)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["method", "", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"]
    assert ["lora", "published", "0.4341", "0.1779", "0.3494", "0.3493"] in rows
    ours = rows[rows.index(["lora", "published", "0.4341", "0.1779", "0.3494", "0.3493"]) + 1]
    assert ours[:2] == ["", "here"] and float(ours[2]) > 0.5
    assert "lora_r 32, here 4" in text and "test rows 1500, here 60" in text and "optim prodigy, here –" in text
    assert "lora_target_modules" not in text
    assert (folder / "published.md").read_text() == text


def test_the_data_sets_file_must_be_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["financial_phrasebank.py"])
    with pytest.raises(SystemExit) as end:
        financial_phrasebank.main()
    assert end.value.code == 2 and "--dataset_name is missing" in capsys.readouterr().err
