"""The subcommand: plan, run, collect, write, show."""

import argparse
import json
from typing import Any

from rich.table import Table as Grid

from toolkit.compare.page import page
from toolkit.compare.plan import Plan, claim, new_plan, read_plan
from toolkit.compare.results import collect
from toolkit.compare.runner import run_all
from toolkit.compare.tables import about, failures, tables, to_csv, to_markdown
from toolkit.config.start import check_name
from toolkit.console import console, say
from toolkit.errors import UserError
from toolkit.files import atomic_write


def compare(args: argparse.Namespace) -> int:
    """Runs what is missing, then writes and shows the results. Returns 1 if a run failed, otherwise 0.

    Raises: UserError for flags that cannot be right, before the first run starts.
    """
    check_name("--output_dir", args.output_dir)
    if args.show:
        if args.methods or args.flags or args.launch:
            given = args.flags[0] if args.flags else "--methods" if args.methods else "--launch"
            raise UserError(f"{given} has no effect with --show, which runs nothing; leave one of them out")
        plan = read_plan(args.output_dir)
    else:
        plan = new_plan(args.output_dir, args.methods, args.seeds, args.launch, args.flags)
        claim(plan, args.flags)
        run_all(plan)
    data = collect(plan)
    write(plan, data)
    show(data)
    say("page", str(plan.folder / "compare.html"))
    return int(bool(failures(data)))


def write(plan: Plan, data: dict[str, Any]) -> None:
    """Writes compare.json, .csv, .md and .html into the comparison's folder."""
    made = {"json": json.dumps(data, indent=1) + "\n", "csv": to_csv(data), "md": to_markdown(data), "html": page(data)}
    for ending, text in made.items():
        atomic_write(plan.folder / f"compare.{ending}", text)


def show(data: dict[str, Any]) -> None:
    """Prints every table."""
    console.print(about(data))
    for table in tables(data):
        grid = Grid(
            title=table.title, title_justify="left", title_style="bold", caption=table.caption, caption_justify="left"
        )
        for number, column in enumerate(table.columns):
            grid.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)
    for line in failures(data):
        say("not done", line)
