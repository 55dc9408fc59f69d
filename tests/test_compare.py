"""Comparisons: flags reach their methods, finished runs and failures are handled, and every output follows from the run folders."""

import argparse
import csv
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from comparison_folder import write_comparison, write_run
from conftest import ROOT, run

from toolkit.compare import plan, runner
from toolkit.compare.command import compare
from toolkit.compare.results import collect
from toolkit.compare.statistics import interval, paired_bootstrap
from toolkit.errors import UserError

# ---- statistics


def test_the_interval_over_seeds_is_students():
    # t(0.975, 2) = 4.3027 (any table); s = 0.1, n = 3
    found = interval([0.4, 0.5, 0.6])
    assert found["mean"] == pytest.approx(0.5) and found["half"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert interval([0.4]) == {"mean": 0.4, "half": None}


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_paired_difference():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(0.55, 0.1, 400), rng.normal(0.50, 0.1, 400)
    found = paired_bootstrap(ours, theirs, [str(i) for i in range(400)])
    half = 1.96 * np.std(ours - theirs, ddof=1) / 20
    assert found["mean"] == pytest.approx(np.mean(ours - theirs))
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.05)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.05)
    assert found["more_than_noise"] and found["p"] < 0.001


def test_equal_systems_and_small_differences_are_noise():
    rng = np.random.default_rng(4)
    scores = rng.random(200)
    same = paired_bootstrap(scores, scores, list(range(200)))
    assert same["p"] == 1.0 and not same["more_than_noise"]
    near = paired_bootstrap(scores + rng.normal(0, 0.2, 200), scores, list(range(200)))
    assert not near["more_than_noise"] and near["p"] > 0.05


def test_the_error_rate_of_the_bootstrap_is_about_five_percent():
    rng = np.random.default_rng(5)
    trials = 300
    noise = [paired_bootstrap(rng.normal(0, 1, 100), rng.normal(0, 1, 100), range(100), 1000) for _ in range(trials)]
    rate = sum(found["more_than_noise"] for found in noise) / trials
    assert 0.02 < rate < 0.09  # 0.05 +- 3 standard errors of 300 trials


def test_rows_of_one_text_are_drawn_together():
    rng = np.random.default_rng(6)
    difference = np.repeat(rng.normal(0, 1, 50), 3)  # three references with equal scores
    apart = paired_bootstrap(difference, np.zeros(150), range(150))
    together = paired_bootstrap(difference, np.zeros(150), np.repeat(np.arange(50), 3))
    ratio = (together["high"] - together["low"]) / (apart["high"] - apart["low"])
    assert ratio == pytest.approx(math.sqrt(3), rel=0.1)


def pair_of_runs(rng, gap=0.0, seeds=3, rows=200, spread=0.03):
    """Scores (seeds, rows) of two methods on the same rows; the standard deviation over seeds is `spread`."""
    hardness = rng.normal(0.5, 0.2, rows)

    def runs(mean):
        return mean + hardness + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.1, (seeds, rows))

    return runs(gap), runs(0.0)


def test_the_same_method_twice_with_three_seeds_rarely_differs_by_more_than_noise():
    rng, pairs, alone = np.random.default_rng(7), 200, 0
    alarms = 0
    for _ in range(pairs):
        ours, theirs = pair_of_runs(rng)
        found = paired_bootstrap(ours, theirs, range(200), 1000)
        assert found["covers"] == "test rows and seeds"
        alarms += found["more_than_noise"]
        alone += paired_bootstrap(ours.mean(0), theirs.mean(0), range(200), 1000)["more_than_noise"]
    assert alarms / pairs <= 0.1  # 0.05 + 3 standard errors of 200 pairs
    assert alone / pairs > 0.3  # what test rows alone would say


def test_a_difference_well_above_that_between_seeds_is_found_with_three_seeds():
    rng = np.random.default_rng(8)
    found = [paired_bootstrap(*pair_of_runs(rng, gap=0.15), range(200), 1000) for _ in range(50)]
    assert sum(one["more_than_noise"] and one["low"] > 0 for one in found) >= 45


def test_more_seeds_narrow_the_interval_and_one_seed_only_covers_rows():
    few, many = (paired_bootstrap(*pair_of_runs(np.random.default_rng(9), seeds=n), range(200)) for n in (3, 30))
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])
    ours, theirs = pair_of_runs(np.random.default_rng(9), seeds=1)
    one = paired_bootstrap(ours, theirs, range(200))
    assert one["covers"] == "test rows"
    assert (
        one == paired_bootstrap(ours[0], theirs[0], range(200)) == paired_bootstrap(ours[0], [*theirs] * 4, range(200))
    )


# ---- the plan


def planned(tmp_path, *flags, methods="full,lora", seeds=2):
    return plan.new_plan(tmp_path / "c", methods, seeds, None, flags)


def test_a_flag_goes_to_the_methods_that_have_it(tmp_path):
    made = planned(tmp_path, "--lora_r", "4", "--lora_target_modules", "q", "v", "--max_steps=3")
    argv = {one.method: one.argv for one in made.runs if one.seed == 1}
    folder = str(tmp_path / "c" / "runs")
    assert argv["full"] == ("--max_steps=3", "--seed", "1", "--output_dir", f"{folder}/full-1")
    assert argv["lora"][:6] == ("--lora_r", "4", "--lora_target_modules", "q", "v", "--max_steps=3")
    assert [(one.seed, one.method) for one in made.runs] == [(0, "full"), (0, "lora"), (1, "full"), (1, "lora")]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("methods", "flags", "message"),
    [
        ("lora,fulll", (), r"--methods fulll is unknown \(did you mean full\?\)"),
        ("base,lora", (), "its row is always there"),
        (None, (), "--methods is missing"),
        ("lora", ("--lora_rr", "4"), r"unknown flag --lora_rr \(did you mean lora_r\?\)"),
        ("lora", ("--lr", "1e-3"), r"unknown flag --lr: use --learning_rate$"),
        ("lora", ("--evaluation_strategy", "no"), r"unknown flag --evaluation_strategy: use --eval_strategy$"),
        ("full", ("--lora_r", "4"), r"unknown flag --lora_r \(it belongs to the method lora"),
        ("lora", ("--hub_token", "hf_x"), "every flag is written into the comparison"),
        ("lora", ("--seed", "4"), "--seeds N gives each method"),
        ("lora", ("--lora_r", "0"), "lora: --lora_r 0 is not possible"),
        ("full,lora", ("--load_in_4bit",), "full: --load_in_4bit and full fine-tuning exclude each other"),
        ("lora", ("stray",), "unexpected value 'stray'"),
    ],
)
def test_flags_that_cannot_be_right_are_refused_before_anything_runs(tmp_path, methods, flags, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, *flags, methods=methods)


def test_a_folder_with_other_settings_is_refused_and_methods_and_seeds_can_be_added(tmp_path):
    first = planned(tmp_path, "--max_steps", "3")
    plan.claim(first, ["--max_steps", "3"])
    with pytest.raises(UserError, match=r"other settings \(flags: --max_steps 3\)"):
        planned(tmp_path, "--max_steps", "4")
    more = plan.new_plan(tmp_path / "c", "lora", 3, None, ["--max_steps", "3"])
    assert more.methods == ("full", "lora") and more.seeds == 3
    assert all(one.argv[:2] == ("--max_steps", "3") for one in more.runs)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        plan.new_plan(tmp_path / "other", "lora", 1, None, [])


# ---- running


@pytest.fixture
def small_recipes(monkeypatch, tmp_path):
    """Replaces launcher and recipe by small Python processes: `full` leaves a synthetic run, `lora` fails."""
    script = tmp_path / "recipe.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[-1])\n"
        "print('started', folder.name, flush=True)\n"
        "if folder.name.startswith('lora'):\n"
        "    raise MemoryError('no room for this')\n"
        "import json, shutil\n"
        "shutil.copytree(Path(sys.argv[0]).parent / 'ready', folder)\n"
    )
    write_run(tmp_path / "ready", "full", 0, rows=8)
    monkeypatch.setattr(runner, "command", lambda run, file: [sys.executable, str(script), *run.argv])
    return script


def arguments(folder: Path, *flags, methods="full,lora", seeds=1, show=False):
    return argparse.Namespace(
        output_dir=folder, methods=methods, seeds=seeds, launch=None, flags=list(flags), show=show
    )


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_finished_runs_are_not_repeated(small_recipes, tmp_path, capfd):
    folder = tmp_path / "c"
    assert compare(arguments(folder, methods="lora,full")) == 1
    shown = capfd.readouterr().out
    assert "2 of 2: full, seed 0" in shown
    assert "lora, seed 0: MemoryError: no room for this" in " ".join(shown.split())
    mark = folder / "runs" / "full-0" / "mark"
    mark.touch()
    small_recipes.write_text(small_recipes.read_text().replace("startswith('lora')", "startswith('none')"))
    assert compare(arguments(folder, methods="lora,full")) == 0
    assert mark.exists() and "1 of 2 runs were done before" in capfd.readouterr().out


def test_the_reported_error_is_the_recipes_not_the_launchers(tmp_path):
    one = plan.Run("lora", 0, tmp_path / "lora-0", ())
    assert runner.why_failed(one) == "not run yet"
    launcher = "subprocess.CalledProcessError: Command '['x']' "
    for text, reason in (
        (
            f"error: --lora_r 0 is not possible\nTraceback\n{launcher}returned non-zero exit status 2.",
            "--lora_r 0 is not possible",
        ),
        (f"  File\nRuntimeError: shape\nTraceback\n{launcher}returned non-zero exit status 1.", "RuntimeError: shape"),
        (
            f"step 3\n{launcher}died with <Signals.SIGKILL: 9>.",
            "the process was killed (SIGKILL), often because memory ran out",
        ),
        ("step 3", "stopped before it finished"),
    ):
        one.log.write_text(text)
        assert runner.why_failed(one) == reason


# ---- results


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = write_comparison(tmp_path_factory.mktemp("comparison") / "c", in_context=True)
    assert compare(arguments(folder, methods=None, show=True)) == 1  # a run is missing
    return folder, json.loads((folder / "compare.json").read_text())


def test_scores_are_means_over_seeds_and_include_the_base(comparison):
    folder, data = comparison
    entries = {entry["method"]: entry for entry in data["entries"]}
    shots = ["in_context, 0-shot", "in_context, 2-shot"]
    assert list(entries) == ["base", "full", "lora", "ia3", "prompt_tuning", *shots]
    tuned = [json.loads((folder / "runs" / f"lora-{s}" / "run.json").read_text())["scores"]["tuned"] for s in range(3)]
    assert entries["lora"]["scores"]["rougeL"]["mean"] == pytest.approx(np.mean([t["rougeL"] for t in tuned]))
    assert entries["base"]["scores"]["rougeL"]["half"] is None and data["headline"] == "rougeL"
    assert entries["ia3"]["tokens_per_second"]["mean"] == pytest.approx(9100, abs=100)
    assert entries["ia3"]["train_seconds"]["mean"] == pytest.approx(100)
    assert entries["lora"]["saved_bytes"] == 4 * 172_032


def test_only_real_differences_are_more_than_noise(comparison):
    entries = {entry["method"]: entry for entry in comparison[1]["entries"]}
    assert not entries["lora"]["difference"]["full"]["more_than_noise"]
    assert entries["prompt_tuning"]["difference"]["full"]["high"] < 0
    assert all(entries[m]["difference"]["base"]["low"] > 0 for m in ("full", "lora", "ia3"))
    assert comparison[1]["data"]["different_texts"] == 30
    covers = {name: entry["difference"].get("base", {}).get("covers") for name, entry in entries.items()}
    assert covers["lora"] == "test rows and seeds" and covers["in_context, 2-shot"] == "test rows"
    (row,) = re.findall(r"\| in_context, 2-shot \| \+.*", (comparison[0] / "compare.md").read_text())
    assert row.endswith("| yes (of test rows only) |")
    mean = entries["ia3"]["scores"]["rougeL"]["mean"] - entries["full"]["scores"]["rougeL"]["mean"]
    assert entries["ia3"]["difference"]["full"]["mean"] == pytest.approx(mean)


def test_in_context_rows_have_their_own_cost_and_are_compared_with_the_base(comparison):
    entries = {entry["method"]: entry for entry in comparison[1]["entries"]}
    none, two = entries["in_context, 0-shot"], entries["in_context, 2-shot"]
    assert none["scores"]["rougeL"]["mean"] == entries["base"]["scores"]["rougeL"]["mean"]
    assert none["difference"]["base"]["p"] == 1.0 and two["difference"]["base"]["low"] > 0
    assert two["context"]["prompt_tokens"]["mean"] == 260 and two["memory"] is None
    assert "In-context learning" in (comparison[0] / "compare.md").read_text()


def test_training_flags_do_not_go_to_methods_that_do_not_train(tmp_path):
    made = planned(
        tmp_path, "--max_steps", "3", "--num_shots", "0", "2", "--max_length", "64", methods="full,in_context"
    )
    argv = {one.method: one.argv for one in made.runs if one.seed == 0}
    assert argv["in_context"][:5] == ("--num_shots", "0", "2", "--max_length", "64")
    assert argv["full"][:4] == ("--max_steps", "3", "--max_length", "64")


def test_memory_is_from_the_seed_that_needed_most_with_its_own_prediction(comparison):
    memory = {entry["method"]: entry.get("memory") for entry in comparison[1]["entries"]}["full"]
    assert memory["measured"]["categories"]["gradients"] == int(3.5 * 1.02 * 2**20)
    assert memory["predicted"]["categories"]["gradients"] == int(3.5 * 1.03 * 2**20)


def test_every_output_gives_the_reason_of_a_failed_seed(comparison):
    folder, _ = comparison
    for name in ("json", "csv", "md", "html"):
        assert "torch.OutOfMemoryError: CUDA out of memory" in (folder / f"compare.{name}").read_text(), name


def test_the_csv_has_a_row_for_each_method_in_plain_numbers(comparison):
    with (comparison[0] / "compare.csv").open(newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert rows["lora"]["trainable"] == "172032" and rows["base"]["trainable"] == ""
    assert float(rows["lora"]["against_full_p"]) > 0.05
    assert int(rows["lora"]["measured_activations_saved_bytes"]) == int(46 * 1.02 * 2**20)


def test_the_page_is_one_well_formed_file_that_needs_no_network(comparison):
    page = (comparison[0] / "compare.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!aclanthology)", page)
    assert "prefers-color-scheme: dark" in page
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert [drawing.get("aria-label").split(".")[0] for drawing in drawings] == [
        "Quality against memory",
        "Scores",
        "Memory at the peak",
        "Learning curves",
    ]
    assert page.count("<figcaption>") == 4
    for drawing in drawings:
        texts = [text.text for text in drawing.iter("text")]
        assert {"full", "lora", "ia3", "prompt_tuning"} <= set(texts)
        assert "NaN" not in ElementTree.tostring(drawing, encoding="unicode")


def test_bars_and_points_match_the_numbers(comparison):
    page, entries = (comparison[0] / "compare.html").read_text(), comparison[1]["entries"]
    svg = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", page, re.DOTALL)[1])
    widths = {
        rect.find("title").text.split(" ± ")[0]: float(rect.get("width"))
        for rect in svg.iter("rect")
        if "ROUGE-L " in rect.find("title").text
    }
    scores = {e["method"]: e["scores"]["rougeL"]["mean"] for e in entries}
    lengths = {name.split(":")[0]: width for name, width in widths.items()}
    for method, score in scores.items():
        assert lengths[method] / lengths["full"] == pytest.approx(score / scores["full"], abs=0.01)


def test_runs_on_other_rows_are_not_compared(tmp_path):
    folder = write_comparison(tmp_path / "c", methods=("full", "lora"), seeds=2)
    path = folder / "runs" / "lora-0" / "run.json"
    path.write_text(path.read_text().replace('"sha256": {"test": "x"}', '"sha256": {"test": "y"}'))
    with pytest.raises(UserError, match=r"lora-0 was scored on other rows than .*full-0"):
        collect(plan.read_plan(folder))


def test_a_comparison_without_methods_or_finished_runs_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no comparison; start one with --methods"):
        compare(arguments(tmp_path, methods=None, show=True))
    with pytest.raises(UserError, match="--max_steps has no effect with --show"):
        compare(arguments(tmp_path, "--max_steps", "3", methods=None, show=True))


@pytest.mark.slow
def test_two_real_runs_are_compared(small_csv, tmp_path):
    folder = tmp_path / "c"
    # the two measured steps are in one epoch, like the predicted ones: in a new epoch Trainer holds 8 bytes less
    short = ("--max_train_samples", "16", "--per_device_train_batch_size", "4", "--max_steps", "3", "--lora_r", "2")
    rest = ("--max_eval_samples", "4", "--output_dir", folder)
    arguments = ("compare", "--methods", "full,lora", "--seeds", "1", *short, *rest)
    done = run("footprint", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((folder / "compare.json").read_text())
    base, full, lora = data["entries"]
    assert full["trainable"] == 906_368 and 0 < lora["trainable"] < 50_000
    assert full["memory"]["measured"]["reserved_bytes"] == full["memory"]["predicted"]["reserved_bytes"]
    assert full["tokens_per_second"]["mean"] > 0 and base["difference"]["full"]["p"] > 0
