"""Where recipes and launch files are: at the top of the repository, or inside the installed package."""

from pathlib import Path

from toolkit.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: str) -> Path:
    """The folder `recipes` or `launch` that came with this package."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def find_launch_file(name: str) -> Path:
    """The launch file `name`: a path, or a file of launch/ in the package, the repository or the working directory.

    Raises: UserError with the nearest name, and all of them.
    """
    folders = (shipped("launch"), Path("launch").resolve())
    is_path = "/" in name or name.endswith((".yaml", ".yml", ".json"))
    for path in [Path(name)] if is_path else [folder / f"{name}.yaml" for folder in folders]:
        if path.is_file():
            return path
    if is_path and (path := shipped("launch") / Path(name).name).is_file() and Path(name).parent == Path("launch"):
        return path  # launch/zero3.yaml, as the documentation writes it, from any folder
    there = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise UserError(
        f"--launch {name}: there is no such launch file{did_you_mean(name, there)}; there are {', '.join(there)}, or "
        "give the path of one of your own"
    )


def find_recipe(name: str) -> Path:
    """The recipe `name`, for instance `lora`.

    Raises: UserError with the nearest name, and all of them.
    """
    there = {file.stem: file for file in sorted(shipped("recipes").glob("*.py"))}
    if name not in there:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, there)}; there are: {', '.join(there)}")
    return there[name]
