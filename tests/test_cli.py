"""The `footprint` command: help, listings, and the committed reference."""

import json
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from toolkit.cli import against, commands, main, parser, subcommands
from toolkit.memory.cuda.cards import CARDS, find_card
from toolkit.methods import METHODS
from toolkit.models import catalogue
from toolkit.runs import api

OWN_FLAGS = ("--gpu", "--gpu_memory", "--launch", "--num_processes", "--json", "--against")


def footprint(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Runs a command in this process; returns exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    return int(end.value.code or 0), *capfd.readouterr()


@pytest.fixture
def given(monkeypatch):
    """Records the arguments that `footprint predict` passes on, instead of predicting."""
    calls = []

    def predict(method, *flags, **own):
        calls.append((method, flags, {name: value for name, value in own.items() if value is not None}))
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "predict", predict)
    return calls


def test_every_command_of_the_parser_is_a_function_and_the_other_way_round(capfd):
    code, out, _ = footprint(capfd, "--help")
    assert code == 0
    assert all(f"\n    {name} " in out for name in commands.__all__)
    for name in commands.__all__:
        assert callable(getattr(commands, name))
        assert footprint(capfd, name, "--help")[0] == 0


def test_the_help_of_predict_without_a_method_lists_its_own_flags(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = footprint(capfd, "predict", "--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {flag} " in out for flag in OWN_FLAGS)
    assert "footprint predict lora --help" in out and "--lora_r" not in out


@pytest.mark.parametrize(
    ("argv", "flags", "own"),
    [
        ("lora --gpu T4 --max_length 512", "--max_length 512", {"gpu": "T4"}),
        ("lora --max_length 512 --gpu=T4", "--max_length 512", {"gpu": "T4"}),
        ("--gpu T4 lora --max_length=512", "--max_length=512", {"gpu": "T4"}),
        ("--json --gpu_memory 24GiB lora --bf16", "--bf16", {"gpu_memory": "24GiB"}),
        (
            "lora --lora_target_modules q v --launch zero3 --num_processes 2 --max_steps -1",
            "--lora_target_modules q v --max_steps -1",
            {"launch": "zero3", "num_processes": 2},
        ),
    ],
)
def test_predicts_own_flags_and_the_recipes_may_come_in_any_order(argv, flags, own, given, capfd):
    assert footprint(capfd, "predict", *argv.split())[0] == 130
    assert given == [("lora", tuple(flags.split()), own | {"advise": True})]


@pytest.mark.parametrize(
    ("argv", "method", "flags", "own"),
    [
        ("lora --max_length 8 --against --bf16", "lora", "--max_length 8 --bf16", {}),
        ("lora --lora_r=2 --seed 3 --against full", "full", "--seed 3", {}),
        ("lora --lora-target-modules q v --seed 3 --against ia3 --seed 4", "ia3", "--seed 3 --seed 4", {}),
        ("qlora --lora_r 2 --against lora", "lora", "--lora_r 2", {}),
        ("lora --bf16 --seed 3 --against --fp16", "lora", "--seed 3 --fp16", {}),
        ("lora --load_in_4bit true --against --load_in_8bit", "lora", "--load_in_8bit", {}),
        ("lora --bf16 --against --fp16 false", "lora", "--bf16 --fp16 false", {}),
        ("lora --gpu T4 --against --seed 3", "lora", "--seed 3", {"gpu": "T4"}),
        ("lora --gpu T4 --against --gpu_memory 24", "lora", "", {"gpu_memory": "24"}),
        (
            "lora --launch zero3 --num_processes 2 --against --num_processes 4",
            "lora",
            "",
            {"launch": "zero3", "num_processes": 4},
        ),
        (
            "lora --launch zero3 --num_processes 2 --against --launch ddp",
            "lora",
            "",
            {"launch": "ddp", "num_processes": 2},
        ),
    ],
)
def test_the_second_configuration_is_the_first_with_its_changes(argv, method, flags, own):
    top = parser()
    first, first.flags = top.parse_known_args(["predict", *argv.split()])
    second = against.second(subcommands(top)["predict"], first)
    found = {name: getattr(second, name) for name in ("gpu", "gpu_memory", "launch", "num_processes")}
    assert (second.method, second.flags) == (method, flags.split())
    assert {name: value for name, value in found.items() if value is not None} == own


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("predict lora --nonsense 1", "unknown flag --nonsense; --help all lists them all"),
        ("predict lora --gpu", "argument --gpu: expected one argument; see footprint predict --help"),
        ("predict lora --launch zero3 --num_processes two", "invalid int value: 'two'; see footprint predict --help"),
        ("predict", "the following arguments are required: METHOD; see footprint predict --help"),
        ("predict lora stray --gpu T4", "unexpected value 'stray': every setting is a flag"),
        ("predict lora --gp T4", "unknown flag --gp"),
        ("predict lora --gpu RTX9999", "unknown GPU 'RTX9999'"),
        ("predict lorra --gpu T4", "unknown method 'lorra' (did you mean lora?)"),
        ("predict lora --launch zerro3", "--launch zerro3: there is no such launch file (did you mean zero3?)"),
        ("train lora --launch zerro3", "--launch zerro3: there is no such launch file (did you mean zero3?)"),
        ("train lora --lora_rank 8 --launch ddp", "unknown flag --lora_rank: use --lora_r"),
        ("train lora --launch ddp --num_processes 0", "--num_processes 0 is not possible"),
        ("train lora --num_processes 2", "--num_processes 2 needs a launch file; add for instance --launch ddp"),
        ("train lora --model_name_or_path ./none", "--model_name_or_path ./none: no such folder"),
        ("train lora --model_name_or_path a/b/c", "--model_name_or_path a/b/c: no such folder"),
        ("train lora --model_name_or_path s3://a/b", "--model_name_or_path s3://a/b: no such folder"),
        ("predict lora --model_name_or_path=", "--model_name_or_path is empty"),
        ("predict lora --gpu_memory 0", "'0' is not a size"),
        ("doctor --launch zerro3", "--launch zerro3: there is no such launch file (did you mean zero3?)"),
        ("train unknown", "unknown method 'unknown'; there are: adapter, bare_loop"),
        ("recipe lorra", "unknown method 'lorra' (did you mean lora?)"),
        ("evaluate runs/none", "runs/none is not a run folder"),
        ("merge runs/none", "runs/none is not a run folder"),
        (
            "generate runs/none text",
            "runs/none is not a run folder: it has no run.json and config.yaml, and no config.json",
        ),
        ("predict lora --against", "both configurations are the same; name after --against what is different"),
        ("predict lora --max_length 64 --against --max-length=64", "both configurations are the same"),
        ("predict lora --gpu T4 --against lora --gpu T4", "both configurations are the same"),
        ("predict lora --against qlorra", "unknown method 'qlorra' (did you mean qlora?)"),
        ("predict lorra --against qlora", "unknown method 'lorra' (did you mean lora?)"),
        ("predict lora --against full --lora_r 8", "unknown flag --lora_r"),
        ("predict lora --against --gpu RTX9999", "unknown GPU 'RTX9999'"),
        (
            "predict lora --against --launch zerro3",
            "--launch zerro3: there is no such launch file (did you mean zero3?)",
        ),
        ("predict lora --against full --against ia3", "--against is given twice"),
        ("predict lora --against=qlora", "--against takes the rest of the line; write it without ="),
        ("gpus --jsn", "unknown flag --jsn (did you mean --json?); footprint gpus --help lists those of gpus"),
        ("gpus 3060", "unexpected 3060; footprint gpus --help"),
        ("trian lora", "invalid choice: 'trian' (did you mean train?)"),
        ("predict lora --gpu RTX 4090", "a value with spaces needs quotes, as --gpu 'RTX 4090'"),
        ("predict lora --quantization 4bit", "unknown flag --quantization: use --load_in_4bit"),
        ("gpu", "invalid choice: 'gpu'"),
        (
            "report runs/none.json",
            "there is no ledger runs/none.json; give the folder of a run whose memory was measured",
        ),
    ],
)
def test_a_mistake_is_one_line(argv, says, capfd):
    code, out, err = footprint(capfd, *argv.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_gpus_are_listed_with_names_that_find_them(capfd):
    code, out, err = footprint(capfd, "gpus", "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)["gpus"]
    assert [entry["name"] for entry in listed] == [card.name for card in CARDS]
    for entry, card in zip(listed, CARDS, strict=True):
        assert all(find_card(name) is card for name in (entry["name"], *entry["aliases"]))
    (ada,) = [entry for entry in listed if entry["name"] == "RTX 4090"]
    assert ada == {
        "name": "RTX 4090",
        "memory_bytes": int(23.52 * 2**30),
        "memory_is_estimate": False,
        "compute_capability": "8.9",
        "architecture": "Ada",
        "aliases": ["4090"],
    }


def test_models_are_listed_with_architecture_and_parameters(capfd):
    listed = json.loads(footprint(capfd, "models", "--json")[1])["models"]
    assert [entry["id"] for entry in listed] == catalogue.names()
    assert {"id": "Qwen/Qwen3-8B", "architecture": "qwen3", "parameters": 8_190_735_360} in listed


def test_methods_are_listed_with_their_papers(capfd):
    listed = json.loads(footprint(capfd, "methods", "--json")[1])["methods"]
    assert [entry["name"] for entry in listed] == sorted(
        path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "bare_loop"
    )
    papers = {entry["name"]: entry["paper"] for entry in listed}
    assert papers["lora"] == "arXiv:2106.09685" and papers["full"] == ""
    assert [entry["name"] for entry in listed if not entry["trains"]] == ["in_context"]
    assert all(entry["summary"].endswith(".") for entry in listed)


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("gpus", ["RTX 4090", "23.52 GiB", "8.9", "Ada", "4090"]),
        ("models", ["Qwen/Qwen3-8B", "qwen3", "8,190,735,360"]),
        ("methods", ["full", "Trains all parameters: the reference for", "-"]),
    ],
)
def test_a_listing_fits_into_80_columns(command, row, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = footprint(capfd, command)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    assert row in cells
    names = {entry.name for entry in CARDS} if command == "gpus" else set(catalogue.names())
    names = set(METHODS) if command == "methods" else names
    assert names <= {line[0] for line in cells if line}


def test_help_and_the_list_of_gpus_import_no_pytorch():
    code = (
        "import sys; import toolkit.cli; assert not {'rich', 'torch', 'transformers', 'toolkit.cli.commands'} & set(sys.modules)\n"
        "from toolkit.cli import commands, parser\n"
        "commands.gpus(parser().parse_args(['gpus']))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "RTX 4090" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("words", [["gpus"], ["models"], ["predict", "lora", "--help", "all"]])
def test_a_reader_that_stops_early_sees_no_traceback(words):
    command = [sys.executable, "-u", "-c", "from toolkit.cli import main; main()", *words]
    shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown.stdout.readline()
    shown.stdout.close()
    assert "Traceback" not in shown.stderr.read()
    assert shown.wait(60) in (0, 1, 141)  # 1 is rich's


def test_the_committed_reference_matches_the_parsers():
    reference = runpy.run_path(str(ROOT / "benchmarks" / "cli_reference.py"))["reference"]()
    committed = (ROOT / "toolkit" / "cli" / "README.md").read_text(encoding="utf-8")
    assert committed == reference, "run: python benchmarks/cli_reference.py"
    assert all(f"### footprint {name}\n" in committed for name in commands.__all__)
    assert all(f"`{flag}" in committed for flag in OWN_FLAGS)
    assert all(f"recipes/{name}.py\n" in committed for name in METHODS)
