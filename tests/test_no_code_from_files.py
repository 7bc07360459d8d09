"""No code comes out of a file (A-07): nothing that the packages call could run what somebody has sent.

One exception, which builds tensors only: `backbone/weights/pickles.py` reads released checkpoints to convert them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_files import ROOT

PACKAGES = (
    "server/promptmux_server",
    "prompts/promptmux_prompts",
    "kernels/promptmux_kernels",
    "clients/python/promptmux",
)
PICKLES = "server/promptmux_server/backbone/weights/pickles.py"
READERS = {"fairseq.py", "transformers_format.py"}
"""Who may ask for a pickle to be read: the loaders of released formats."""

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load"}
ARGUMENTS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}
"""And what each of them must be."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> Iterator[str]:
    """What a module imports or calls that could run code out of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in CALLS:
                yield dotted(node.func)
            yield from (str(keyword.arg) for keyword in node.keywords if not is_harmless(keyword))


def is_harmless(keyword: ast.keyword) -> bool:
    if keyword.arg not in ARGUMENTS:
        return True
    return isinstance(keyword.value, ast.Constant) and keyword.value.value is ARGUMENTS[keyword.arg]


def found(root: Path) -> dict[str, list[str]]:
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    by_file = {str(path.relative_to(root)): list(offences(path.read_text(encoding="utf-8"))) for path in paths}
    return {path: lines for path, lines in by_file.items() if lines}


def test_nothing_that_is_called_could_run_code_out_of_a_file() -> None:
    assert found(ROOT) == {PICKLES: ["pickle", "torch.load"]}


def test_only_the_loaders_of_released_formats_read_pickles() -> None:
    users = {
        path.name
        for path in (ROOT / "server").rglob("*.py")
        if "weights.pickles" in path.read_text(encoding="utf-8") and path.name != "test_no_code_from_files.py"
    }
    assert users == READERS


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import yaml",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_way_is_noticed(line: str) -> None:
    """The control."""
    assert list(offences(line))


@pytest.mark.parametrize("line", ["model.eval()", "np.load(path)", "subprocess.run(words)", "re.compile(text)"])
def test_what_is_harmless_is_not(line: str) -> None:
    assert list(offences(line)) == []
