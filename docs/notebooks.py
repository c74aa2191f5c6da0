"""The tutorials: notebooks that run without Jupyter and without a network, and become pages of the site.

python docs/notebooks.py              # runs all of docs/tutorials and stores what they print and show
python docs/notebooks.py NOTEBOOK ... # runs these

A cell is plain Python, so that a few lines can run it; what Jupyter would show of its last line is stored. MkDocs calls
`on_files` of this file (`hooks` of mkdocs.yml).
"""

import ast
import base64
import contextlib
import io
import json
import linecache
import os
import re
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tutorials"
ORDER = ("judge", "train_and_compare", "prototypes", "add_a_method")


def run(path: Path) -> None:
    """Run the code cells of a notebook, in an empty working folder, and store their outputs in it."""
    notebook = json.loads(path.read_text())
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # where Jupyter has the names of a notebook
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        cell["outputs"] = outputs("".join(cell["source"]), module, f"<cell {number}>")
        cell["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def outputs(source: str, module: types.ModuleType, name: str) -> list[dict[str, Any]]:
    """What a cell prints, and what it shows: the value of its last line."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for tracebacks and `inspect`
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), module.__dict__)
        if last is not None:
            value = eval(compile(last, name, "eval"), module.__dict__)
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        shown = {"output_type": "display_data", "metadata": {}, "data": data_of(value)}
        found.append(shown)
    return found


def data_of(value: Any) -> dict[str, Any]:
    """A value in the forms that Jupyter asks for."""
    data: dict[str, Any] = {"text/plain": re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value)).splitlines(True)}
    if hasattr(value, "_repr_png_"):
        return {**data, "image/png": base64.b64encode(value._repr_png_()).decode()}
    if hasattr(value, "_repr_html_"):
        return {**data, "text/html": value._repr_html_().splitlines(True)}
    return data


def markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook with its stored outputs as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                parts.append(f"![What the cell shows](data:image/png;base64,{data['image/png']})")
            elif "text/html" in data:
                parts.append(re.sub(r"<style.*?</style>|\n\s*", "", "".join(data["text/html"]), flags=re.DOTALL))
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    title, *rest = parts
    note = f"This page is a notebook: `docs/tutorials/{name}.ipynb`. It runs on a CPU, without a network."
    return "\n\n".join([title, note, *rest]) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Of MkDocs: put a page in the place of each notebook."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        notebook = json.loads(Path(file.abs_src_path).read_text())
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=markdown(notebook, Path(page).stem)))
    return files


def no_network(self: socket.socket, address: Any) -> None:
    raise OSError(f"a tutorial must not need a network; it asked for {address}")


def main(names: list[str]) -> None:
    """Each notebook runs in a process of its own."""
    paths = [Path(name).resolve() for name in names] or [FOLDER / f"{name}.ipynb" for name in ORDER]
    if len(paths) == 1:
        socket.socket.connect = no_network  # type: ignore[method-assign,assignment]
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(paths[0])
            os.chdir(paths[0].parent)
        return
    import subprocess

    for path in paths:
        subprocess.run([sys.executable, __file__, str(path)], check=True)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
