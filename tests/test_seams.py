"""The registry of seams is correct and complete; `make stacks` runs this with the oldest and newest supported libraries."""

import re
import subprocess
import sys
import types
from dataclasses import replace
from importlib.metadata import version

import pytest
import seam_finder
from conftest import ROOT
from transformers import TrainerCallback

from toolkit.seams import SEAMS, TABLES, Seam, applies_to_installed, check, patched
from toolkit.seams.__main__ import main
from toolkit.seams.seam import find, ours

MODULES = seam_finder.modules()
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
OF_TOOLKIT = [module for module in MODULES if not module.startswith(seam_finder.OUTSIDE)]
OWN = seam_finder.own_names(list(SOURCES.values()))
# Our own or Python's names, although set on or read from a library's object: marks of methods on a model, an enum's value.
NOT_OF_A_LIBRARY = {"value", "loraplus_lr_ratio", "initial_adapter", "_additive", "_masked"}


@pytest.mark.parametrize("seam", SEAMS.values(), ids=lambda seam: seam.name)
def test_the_installed_library_matches_the_registry(seam):
    difference = check(seam)
    assert difference is None, f"{difference}: then {seam.breaks} (in {', '.join(seam.places)})"


def test_no_two_seams_have_the_same_name():
    assert len(SEAMS) == sum(len(table.TABLE) for table in TABLES)


def test_each_place_of_a_seam_is_a_module_that_mentions_it():
    wrong = []
    for seam in SEAMS.values():
        for module in (place.split(":")[0] for place in seam.places):
            if module not in MODULES:
                wrong.append(f"{seam.name}: there is no module {module}")
            elif seam.kind != "constant" and f'"{seam.name}"' not in SOURCES[module]:
                names = {path.rpartition(".")[2] for _, path in seam.targets} or _names(seam)
                words = {*re.findall(r"\w+", SOURCES[module])} & names
                wrong += [] if words else [f"{seam.name}: {module} mentions none of {', '.join(sorted(names))}"]
    assert not wrong, "\n".join(wrong)


def test_each_copied_fact_is_checked_by_a_source_a_probe_or_an_existing_test():
    for seam in SEAMS.values():
        assert not seam.checked_by or (ROOT / seam.checked_by).is_file(), seam.name
        assert seam.kind != "constant" or seam.source or seam.probe or seam.checked_by or seam.targets, seam.name


def _names(seam: Seam) -> set[str]:
    """All names that a seam covers: those of its targets, and those in the source texts that it requires."""
    targets = {part for module, path in seam.targets for part in (*path.split("."), module.split(".")[-1])}
    return targets | {word for _, pattern in seam.source for word in re.findall(r"\w+", pattern)}


def test_each_seam_that_a_comment_names_is_in_the_registry():
    lists = [text for source in SOURCES.values() for text in re.findall(r'[Ss]eams?((?:[\s,]|and|"[^"]+")+)', source)]
    named = {name for text in lists for name in re.findall(r'"([^"]+)"', text)}
    assert len(named) > 5
    assert named <= {*SEAMS}


def test_no_private_name_patch_or_silent_read_is_missing_from_the_registry():
    missing = []
    for module, source in SOURCES.items():
        here = [seam for seam in SEAMS.values() if module in {place.split(":")[0] for place in seam.places}]
        known = {name for seam in here for name in _names(seam)}
        known |= {seam.name for seam in here}  # for `patched`
        found = seam_finder.find_in(source, OWN | NOT_OF_A_LIBRARY, seam_finder.classes(module))
        missing += [f"{module}, line {one.line}: {one.kind} {one.name}" for one in found if one.name not in known]
    assert not missing, "register these in a table of toolkit/seams, with their module:\n" + "\n".join(missing)


def test_no_override_is_missing_from_the_registry():
    registered = {
        (place, path.rpartition(".")[2])
        for seam in SEAMS.values()
        if seam.kind == "override"
        for place in seam.places
        for _, path in seam.targets
    }
    missing = []
    for module in OF_TOOLKIT:
        for name, cls in seam_finder.classes(module).items():
            for method, base in seam_finder.overrides_of(cls):
                event = issubclass(base, TrainerCallback) and method.startswith("on_")  # they have their own seam
                documented = base.__module__ == "argparse"  # `error`, which Python documents as overridable
                if not event and not documented and (f"{module}:{name}", method) not in registered:
                    missing.append(f"{module}:{name}.{method} overrides {base.__qualname__}'s")
    assert not missing, "register these in a table of toolkit/seams:\n" + "\n".join(missing)


def test_each_event_of_a_callback_exists_in_trainer():
    events = {path.rpartition(".")[2] for _, path in SEAMS["events of TrainerCallback"].targets}
    for module in OF_TOOLKIT:
        for name, cls in seam_finder.classes(module).items():
            if issubclass(cls, TrainerCallback):
                assert {method for method in vars(cls) if method.startswith("on_")} <= events, f"{module}:{name}"


# ---- the checks above report what differs


def test_a_missing_name_is_reported():
    gone = replace(SEAMS["F.softmax"], target="torch.nn.functional: softmax_of_old")
    assert check(gone) == "torch.nn.functional has no softmax_of_old any more"
    assert check(replace(gone, target="torch.nn.no_module: x")) == "there is no torch.nn.no_module any more"


def test_a_patched_function_with_another_parameter_is_reported():
    moved = replace(SEAMS["F.dropout"], signature=("input", "p", "training"))
    assert "takes (input, p, training, inplace), and we need (input, p, training)" in check(moved)


def test_an_override_whose_base_is_missing_or_not_called_is_reported():
    seam = SEAMS["FineTuner._get_grad_norm"]
    gone = replace(seam, target="transformers.trainer: Trainer._get_norm_of_gradients")
    assert check(gone) == "transformers.trainer has no Trainer._get_norm_of_gradients any more"
    assert "is not called by transformers.trainer_pt_utils any more" in check(
        replace(seam, called_in="transformers.trainer_pt_utils")
    )


def test_an_override_that_lacks_a_parameter_of_its_base_is_reported(monkeypatch):
    from toolkit.training.trainer import FineTuner

    monkeypatch.setattr(FineTuner, "_get_grad_norm", lambda self, model: None)
    assert "the library has the parameter grad_norm, and ours does not" in check(SEAMS["FineTuner._get_grad_norm"])


def test_an_attribute_that_a_class_assigns_to_its_instances_counts_as_present():
    stage3 = "deepspeed.runtime.zero.stage3"
    find(stage3, "DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat")
    with pytest.raises(LookupError, match=r"has no DeepSpeedZeroOptimizer_Stage3\.masters any more"):
        find(stage3, "DeepSpeedZeroOptimizer_Stage3.masters")


def test_a_missing_text_in_a_librarys_source_is_reported():
    seam = replace(SEAMS["1536 rows"], source=(("bitsandbytes/backends/cuda/ops.py", r"max_m = 2048$"),))
    assert "has no text like" in check(seam)
    assert check(replace(seam, source=(("bitsandbytes/backends/cuda/none.py", "x"),))).endswith("none.py is gone")


@pytest.mark.parametrize(
    ("name", "place", "changed", "message"),
    [
        (
            "operators of CUDA's autocast",
            "memory.cuda.autocast:FP32",
            lambda old: old[1:],
            "AT_FORALL_FP32 also has acos",
        ),
        ("operators of CUDA's autocast", "memory.cuda.autocast:FP32", lambda old: [*old, "relu"], "has no relu"),
        ("attributes of ZeRO's optimizers", "memory.census:OFFLOADED", lambda old: (*old, "masters"), "have masters"),
        ("handle of a disk", "memory.shadow.simulated_rank:Disk", lambda old: object, "calls .*wait of a handle"),
        ("names of methods", "methods.peft_method:UNFIT", lambda old: {**old, "GONE": ""}, "PEFT has no GONE any more"),
        (
            "operators that stand-ins replace",
            "memory.cuda.quantized:STAND_INS",
            lambda old: {},
            "differ in .*gemm_4bit",
        ),
        ("types of models", "models.loading:T5_FAMILY", lambda old: {"t6"}, "no model type t6"),
        (
            "fields of GenerationConfig",
            "models.generation:BEAMS",
            lambda old: ("beams",),
            "GenerationConfig has no beams",
        ),
        ("sequence number of AccumulateGrad", "memory.trace:_NO_SEQUENCE_NUMBER", lambda old: 2**64, "sequence number"),
        (
            "_gemm_4bit_use_custom_cuda",
            "memory.cuda.quantized:fused_rule",
            lambda old: lambda: None,
            "has no _gemm_4bit",
        ),
        (
            "errors of a full disk",
            "training.checkpoints:is_write_failure",
            lambda old: lambda error: False,
            "RuntimeError",
        ),
        (
            "F.scaled_dot_product_attention",
            "memory.cuda.attention:attention_on",
            lambda old: lambda card: len,
            "and ours",
        ),
    ],
)
def test_a_copied_fact_that_is_wrong_is_reported(name, place, changed, message, monkeypatch):
    module, _, attribute = place.partition(":")
    monkeypatch.setattr(f"toolkit.{module}.{attribute}", changed(ours(place)))
    assert re.search(message, check(SEAMS[name]))


def test_a_seam_applies_only_to_its_versions():
    here = replace(SEAMS["F.softmax"], since=version("torch").split("+")[0])
    assert applies_to_installed(here)
    assert not applies_to_installed(replace(here, since="99.0"))
    assert not applies_to_installed(replace(here, until=here.since, since=None))
    assert check(replace(here, since="99.0", target="torch: nothing")) is None


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("import torch._inductor.config", "import", "_inductor"),
        ("from torch._subclasses import fake_tensor", "import", "fake_tensor"),
        ("from transformers.trainer import _is_peft_model", "import", "_is_peft_model"),
        ("import torch\nx = torch._C", "private", "_C"),
        ("def f(model):\n    return model._dtype_of_old", "private", "_dtype_of_old"),
        ("def f(model):\n    return getattr(model, 'is_old', False)", "silent", "is_old"),
        ("def f(model):\n    return hasattr(model, 'is_old')", "silent", "is_old"),
        ("import torch\ntorch.add = None", "patch", "add"),
        ("from torch.nn import functional as F\nsetattr(F, 'gelu', None)", "patch", "gelu"),
        ("from peft import x\ndef f():\n    layer = x.Layer\n    layer.update = 1", "patch", "update"),
        ("from unittest.mock import patch\nimport torch\npatch.object(torch, 'add')", "patch", "add"),
        ("def f(trainer):\n    def step(): ...\n    trainer.training_step = step", "patch", "training_step"),
        ("def f(model):\n    model.forward = lambda x: x", "patch", "forward"),
        ("from peft.mapping import TABLE\nTABLE['x'] = 1", "patch", "TABLE"),
        ("from accelerate import State\nState.__init__ = None", "patch", "__init__"),
        ("import torch\ntorch.library.Library('aten', 'IMPL')", "patch", "Library"),
    ],
)
def test_names_that_are_not_registered_are_found(source, kind, name):
    assert (kind, name) in {(one.kind, one.name) for one in seam_finder.find_in(source, set(), {})}


def test_a_base_class_attribute_that_a_subclass_sets_is_found():
    from toolkit.training.trainer import FineTuner

    source = "class FineTuner:\n    def __init__(self):\n        self._loss_shifts_labels = False\n        self.guards = None"
    found = seam_finder.find_in(source, {"guards"}, {"FineTuner": FineTuner})
    assert {one.name for one in found} == {"_loss_shifts_labels"}


def test_an_override_is_found():
    from toolkit.training.trainer import FineTuner

    assert "_get_grad_norm" in {method for method, _ in seam_finder.overrides_of(FineTuner)}


# ---- patching


@pytest.fixture
def library(monkeypatch):
    """A module with a function, two classes, and a seam into each."""
    module = types.ModuleType("library_of_a_test")
    base = type("Base", (), {"step": lambda self: "base"})
    module.function, module.Base, module.Derived = (lambda: "its own"), base, type("Derived", (base,), {})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("function", "Base.step", "Derived.step"):
        seam = Seam(name=name, kind="patch", where="x", target=f"library_of_a_test: {name}", reason="", breaks="")
        monkeypatch.setitem(SEAMS, name, seam)
    return module


def test_a_patch_is_undone_at_the_end_when_nested_and_after_an_error(library):
    own = library.function
    with patched("function", lambda: "first"):
        with patched("function", lambda: "second"):
            assert library.function() == "second"
        assert library.function() == "first"
        with pytest.raises(ZeroDivisionError), patched("function", lambda: "third"):
            raise ZeroDivisionError
        assert library.function() == "first"
    assert library.function is own


def test_a_patch_of_an_inherited_method_is_deleted_again(library):
    with patched("Derived.step", lambda self: "patched"):
        assert library.Derived().step() == "patched" and library.Base().step() == "base"
    assert "step" not in vars(library.Derived) and library.Derived().step() == "base"


def test_a_patch_of_one_object_does_not_change_the_others(library):
    one = library.Base()
    with patched("Base.step", lambda: "patched", owner=one):
        assert one.step() == "patched" and library.Base().step() == "base"
    assert not vars(one)


def test_an_unregistered_or_missing_target_cannot_be_patched(library):
    with pytest.raises(LookupError, match=r"'torch\.add' is no registered patch"), patched("torch.add", None):
        pass
    with pytest.raises(LookupError, match="is no registered patch"), patched("FakeTensor", None):
        pass
    del library.function
    with pytest.raises(LookupError, match="library_of_a_test has no function to replace"), patched("function", None):
        pass


def test_seams_are_listed_by_library(capsys):
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SEAMS)
    assert main(["--list", "peft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[0] for line in lines} == {name for name, seam in SEAMS.items() if seam.package == "peft"}
    seam = SEAMS["attributes of a PeftModel"]
    assert f"{seam.name} | {seam.kind} | {', '.join(seam.places)} | {seam.reason}" in lines


def test_the_registry_imports_no_library():
    program = "import sys, toolkit.seams; print({name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    libraries = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "numpy")
    assert not [name for name in libraries if f"'{name}'" in done.stdout]
