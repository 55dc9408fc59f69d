"""What a `FineTuner` takes, made without flags: a configuration around training arguments, and rows around a tokenizer."""

from types import SimpleNamespace
from typing import Any

from toolkit.config import TrainArguments
from toolkit.data.loading import TaskData
from toolkit.distributed.request import requested_engine
from toolkit.methods import METHODS, Method


def config_of(args: TrainArguments, method: Method | None = None, **others: Any) -> SimpleNamespace:
    """As much of `Config` as training asks for, with the engine that was requested of the launcher."""
    engine = requested_engine(args.deepspeed, args.fsdp)
    return SimpleNamespace(training=args, engine=engine, method=method or METHODS["full"](), **others)


def task_data(task: Any, train: Any, validation: Any, tokenizer: Any, test_prompts: Any = ()) -> TaskData:
    """The rows `train` and `validation`, and prompts (token ids) of a test split."""
    prompts = SimpleNamespace(tokenizer=tokenizer)
    return TaskData(task, None, {}, prompts, train, validation, list(test_prompts), [], {}, [], {}, 0)
