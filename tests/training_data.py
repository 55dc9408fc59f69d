"""Arguments of a `FineTuner`, made without flags: a configuration from training arguments, and data from rows and a tokenizer."""

from types import SimpleNamespace
from typing import Any

from toolkit.config import TrainArguments
from toolkit.data.loading import TaskData
from toolkit.distributed.request import requested_engine
from toolkit.methods import METHODS, Method


def config_of(args: TrainArguments, method: Method | None = None, **others: Any) -> SimpleNamespace:
    """The parts of `Config` that training needs, with the engine that the launcher requests."""
    engine = requested_engine(args.deepspeed, args.fsdp)
    return SimpleNamespace(training=args, engine=engine, method=method or METHODS["full"](), **others)


def task_data(task: Any, train: Any, validation: Any, tokenizer: Any, test_prompts: Any = ()) -> TaskData:
    """Data with the rows `train` and `validation`, and prompts (token ids) of a test split."""
    prompts = SimpleNamespace(tokenizer=tokenizer)
    return TaskData(task, None, {}, prompts, train, validation, list(test_prompts), [], {}, [], {}, 0)
