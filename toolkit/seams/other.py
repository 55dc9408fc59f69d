"""Seams into smaller libraries and into Python's standard library."""

from __future__ import annotations

from toolkit.seams.seam import Seam

TABLE = (
    Seam(
        name="huggingface_hub's offline mode",
        kind="patch",
        where="models.hub",
        target="huggingface_hub.constants: HF_HUB_OFFLINE",
        source=(("huggingface_hub.constants", r"return HF_HUB_OFFLINE"),),
        reason="without a network the libraries use their caches at once, as if the user had set HF_HUB_OFFLINE",
        breaks="a machine without a network waits for half a minute of retries",
    ),
    Seam(
        name="offline mode of datasets",
        kind="patch",
        where="models.hub",
        target="datasets.config: HF_HUB_OFFLINE",
        source=(("datasets.load", r"config\.HF_HUB_OFFLINE"),),
        reason="the same, for data sets",
        breaks="a machine without a network waits for half a minute of retries",
    ),
    Seam(
        name="argparse's actions",
        kind="private",
        where=("config.parser", "config.help", "config.start", "runs.launching", "cli", "benchmarks.cli_reference"),
        target="argparse: ArgumentParser._actions ArgumentParser._action_groups _SubParsersAction _StoreFalseAction _ArgumentGroup._group_actions",
        library="python",
        reason="the flags of a recipe, by name, and their help; --resume_from_checkpoint may stand without a value; the CLI reference",
        breaks="no recipe can read its flags: an AttributeError",
        probe=lambda: _actions_differ(),
    ),
    Seam(
        name="Dataset._indices",
        kind="private",
        where="data.readers",
        target="datasets: Dataset._indices",
        source=(("datasets.arrow_dataset", r"self\._indices\.column\(0\)|_indices is not None"),),
        reason="selected or shuffled rows are an index over the table",
        breaks="a column is read in the order of the file: an AttributeError",
    ),
    Seam(
        name="metrics of evaluate",
        kind="override",
        where=("tasks.metrics.classification:Classification", "tasks.metrics.rouge:Rouge"),
        target="evaluate.module: EvaluationModule._info EvaluationModule._compute",
        reason="the two methods that evaluate documents for custom metrics",
        breaks="scoring ends with an error",
    ),
    Seam(
        name="Console.render_str",
        kind="override",
        where="console:PlainConsole",
        target="rich.console: Console.render_str",
        reason="every text that is printed passes it, in lines and in cells of tables",
        breaks="control characters in a name from outside reach the terminal",
        silent=True,
        checked_by="tests/test_outside.py",
    ),
    Seam(
        name="torchao's optimizers",
        kind="constant",
        where="memory.shadow.optimizers",
        library="torchao",
        source=(
            ("torchao/optim/adam.py", r"local_p\.numel\(\) >= 4096 and local_p\.numel\(\) % self\.block_size == 0"),
            ("torchao/optim/subclass_4bit.py", r"codes = torch\.zeros\(n_elems // 2, dtype=torch\.uint8"),
            ("torchao/optim/subclass_8bit.py", r"scale = torch\.zeros\(codes\.numel\(\) // block_size"),
        ),
        reason="the shapes of their state",
        breaks="it is predicted too small or too large",
        silent=True,
        checked_by="tests/memory/test_low_rank_optimizers.py",
    ),
    Seam(
        name="GaLore's optimizers",
        kind="constant",
        where=("memory.shadow.optimizers", "memory.census"),
        library="galore_torch",
        source=(("galore_torch/galore_projector.py", r"self\.ortho_matrix = self\.get_orthogonal_matrix"),),
        reason="their state, their temporaries, and the name of the matrix that a projector keeps",
        breaks="they are predicted too small or too large",
        silent=True,
        checked_by="tests/memory/test_low_rank_optimizers.py",
    ),
    Seam(
        name="APOLLO's optimizers",
        kind="constant",
        where=("memory.shadow.optimizers", "memory.census"),
        library="apollo_torch",
        source=(("apollo_torch/random_projector.py", r"self\.ortho_matrix = self\.get_orthogonal_matrix"),),
        reason="as for GaLore's",
        breaks="they are predicted too small or too large",
        silent=True,
        checked_by="tests/memory/test_low_rank_optimizers.py",
    ),
    Seam(
        name="Optimizer.step",
        kind="override",
        where=(
            "memory.shadow.optimizers:AdamW8bit",
            "memory.shadow.optimizers:GaLoreAdamW",
            "memory.shadow.optimizers:APOLLOAdamW",
        ),
        target="torch.optim.optimizer: Optimizer.step",
        called_in="",
        reason="stand-ins for the optimizers of packages",
        breaks="their predictions end with an error",
    ),
    Seam(
        name="Prodigy.step",
        kind="override",
        where="config.optimizers:Prodigy",
        target="prodigyopt.prodigy: Prodigy.step",
        called_in="",
        source=(
            ("prodigyopt.prodigy", r"if 'step' not in state:"),
            *(("prodigyopt.prodigy", rf"state\['{name}'\]") for name in ("s", "p0", "exp_avg", "exp_avg_sq")),
        ),
        reason="a tensor's first value is always kept; in a shadow step each number that is read is 1",
        breaks="the state has other names, and the library makes its own state as well: memory is counted twice",
        silent=True,
        probe=lambda: _prodigy_keeps_more(),
    ),
)


def _actions_differ() -> str | None:
    import argparse

    parser = argparse.ArgumentParser()
    action = parser.add_argument("--flag")
    known = action in parser._actions and {"dest", "nargs", "const", "option_strings"} <= {*vars(action)}
    return None if known else "a flag is not among _actions, or has other attributes"


def _prodigy_keeps_more() -> str | None:
    """Checks that a step of the library's optimizer keeps exactly the tensors that ours makes for it."""
    import prodigyopt
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = prodigyopt.Prodigy([weight])
    optimizer.step()
    names = {*optimizer.state[weight]}
    return None if names == {"step", "s", "p0", "exp_avg", "exp_avg_sq"} else f"its state is {', '.join(sorted(names))}"
