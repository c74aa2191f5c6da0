"""Configs from files and the command line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from interp_models import __version__
from interp_models.__main__ import main
from interp_models.config.describe import describe
from interp_models.config.loading import as_dict, check, configured, load_yaml, override, save_yaml
from interp_models.config.shipped import config_path
from interp_models.core.command import as_called, command
from interp_models.core.errors import InputError
from interp_models.evaluation.config import EvaluateConfig, ValidationConfig
from interp_models.runs.building import data_options, resolve
from interp_models.runs.config import TrainConfig
from interp_models.runs.loading import run_config
from interp_models.training.recipe import Optimizer, Phase
from tests.conftest import BCNN_LRS, TINY, tiny_config


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Files


def test_a_file_extends_another(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\ndata: {size: 2, dataset: {name: cub, root: here}}\nphases: [a, b]\n")
    top = write(
        tmp_path / "deep" / "top.yaml",
        "extends: ../base.yaml\nexperiment: x\ndata: {dataset: {root: there}}\nphases: [c]\n",
    )
    assert load_yaml(top) == {
        "seed": 1,
        "data": {"size": 2, "dataset": {"name": "cub", "root": "there"}},
        "phases": ["c"],
        "experiment": "x",
    }


def test_extends_in_a_chain(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "seed: 1\ndata: {size: 1, root: a}\n")
    write(tmp_path / "deep/b.yaml", "extends: ../a.yaml\ndata: {root: b, more: 2}\n")
    write(tmp_path / "deep/c.yaml", "extends: b.yaml\nexperiment: c\n")
    top = write(tmp_path / "d.yaml", "extends: deep/c.yaml\ndata: {more: 3}\n")
    assert load_yaml(top) == {"seed": 1, "data": {"size": 1, "root": "b", "more": 3}, "experiment": "c"}


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    write(a, "extends: ./b.yaml\n")
    write(b, "extends: c.yaml\n")
    write(c, "extends: a.yaml\n")
    with pytest.raises(InputError) as error:
        load_yaml(a)
    assert str(error.value) == f"configs extend each other in a circle: {a} -> {b} -> {c} -> {a}"
    write(c, "extends: c.yaml\n")
    with pytest.raises(InputError, match=r"circle: .*/b\.yaml -> .*/c\.yaml -> .*/c\.yaml$"):
        load_yaml(b)
    write(c, "extends: [a.yaml, b.yaml]\n")
    with pytest.raises(InputError, match=r"c\.yaml: extends must be the name of one file; got \['a"):
        load_yaml(c)


def test_missing_base_is_named(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "extends: bse.yaml\n")
    write(tmp_path / "base.yaml", "seed: 1\n")
    with pytest.raises(InputError) as error:
        load_yaml(top)
    assert str(error.value) == (
        f"config {tmp_path}/bse.yaml, which {top} extends, does not exist; found there: {tmp_path}/base.yaml, {top}"
    )


def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_yaml(tmp_path / "c.yaml") == {"seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, c: 2, b: 3}\n", "is not valid yaml: .*duplicate key b"),
        ("a:\n\tb: 1\n", "is not valid yaml: .*line 2"),
        ("a: [1, 2\nb: 3", "is not valid yaml: .*line 2"),
        ("a: 1\na: 2\n", "is not valid yaml: .*duplicate key a"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("a: ${b", "is not valid yaml"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"config {tmp_path}/c.yaml {message}") as error:
        load_yaml(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"config .*c\.yaml cannot be read: 'utf-8' codec can't decode"):
        load_yaml(tmp_path / "c.yaml")
    with pytest.raises(InputError, match=r"does not exist; found there: .*c\.yaml"):
        load_yaml(tmp_path / "d.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match=r"config .*folder\.yaml does not exist"):
        load_yaml(tmp_path / "folder.yaml")


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "c.yaml", "# nothing\n")) == {}


# Overrides

NODE = {
    "seed": 0,
    "data": {"dataset": {"name": "cub", "root": "a"}, "size": 2},
    "phases": [{"epochs": 5, "lrs": {"head": 1.0, "trunk": 2.0}}, {"epochs": 6}],
}


@pytest.mark.parametrize(
    ("assignment", "path", "expected"),
    [
        ("seed=3", ["seed"], 3),
        ("phases[0].epochs=1", ["phases", 0, "epochs"], 1),
        ("phases[1].epochs=1", ["phases", 1, "epochs"], 1),
        ("phases[0].lrs.head=1e-3", ["phases", 0, "lrs"], {"head": 0.001, "trunk": 2.0}),
        ("phases[0].lrs={head: 1e-3}", ["phases", 0, "lrs"], {"head": 0.001}),
        ("phases[0].lrs={}", ["phases", 0, "lrs"], {}),
        ("phases=[{epochs: 2}]", ["phases"], [{"epochs": 2}]),
        ("data.dataset.root=/b=c/d e", ["data", "dataset"], {"name": "cub", "root": "/b=c/d e"}),
        ("data.dataset={name: other}", ["data", "dataset"], {"name": "other"}),
        ("data.size=null", ["data", "size"], None),
        ("data.size=0x10", ["data", "size"], 16),
        ("new.deep.key=true", ["new"], {"deep": {"key": True}}),
        ("names=[a, 1, 1.5, null, 'x y']", ["names"], ["a", 1, 1.5, None, "x y"]),
        ("nested={a: {b: [1, {c: 2e-4}]}}", ["nested"], {"a": {"b": [1, {"c": 0.0002}]}}),
        ("text='1e-3'", ["text"], "1e-3"),
        ("copy=${data.size}", ["copy"], 2),
    ],
)
def test_an_override_changes_one_thing(assignment: str, path: list[Any], expected: Any) -> None:
    changed = override(NODE, [assignment])
    value: Any = changed
    for key in path:
        value = value[key]
    assert value == expected
    assert type(value) is type(expected)
    if path[0] in NODE:  # nothing beside it
        undone: Any = changed
        original: Any = NODE
        for key in path[:-1]:
            undone, original = undone[key], original[key]
        undone[path[-1]] = original[path[-1]]
        assert changed == NODE


def test_overrides_apply_in_order_and_leave_the_node_alone() -> None:
    assert override(NODE, ["seed=1", "data={size: 7}", "data.size=8", "seed=2"]) == {
        **NODE,
        "seed": 2,
        "data": {"size": 8},
    }
    assert NODE["seed"] == 0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "'seed' is not an override; write key=value"),
        ("=3", "'=3' is not an override; write key=value"),
        ("phases[2].epochs=1", "override 'phases[2].epochs=1' cannot be applied: list index out of range"),
        ("phases[x].epochs=1", "override 'phases[x].epochs=1' cannot be applied: Index 'x' (str) is not an int"),
        ("data.size=", "'data.size=' has no value; data.size=null means none, data.size=\"''\" is empty text"),
        (
            "data.size[0=1",
            "override 'data.size[0=1' cannot be applied: 'data.size[0' is not a key such as",
        ),
        ("seed.deep=1", "override 'seed.deep=1' cannot be applied: 0 holds no 'deep'"),
        ("data.size=[1", "'[1' is not valid yaml: expected ',' or ']'"),
        ("data.size=${nope}", "config.data.size: Interpolation key 'nope' not found"),
    ],
)
def test_bad_overrides(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        override(NODE, [assignment])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_broken_interpolation_in_a_file_says_where(tmp_path: Path) -> None:
    node = load_yaml(write(tmp_path / "c.yaml", "data: {root: '${nowhere}'}\nseed: ${data.size}\n"))
    with pytest.raises(InputError, match=r"^config\.data\.root: Interpolation key 'nowhere' not found$"):
        override(node, [])


# Schema


def test_the_config_becomes_dataclasses(tmp_path: Path) -> None:
    config = check(TrainConfig, tiny_config(tmp_path))
    assert config.phases == [Phase("train", 2, {"backbone": 1e-3, "attention": 1e-2, "head": 1e-2})]
    assert config.optimizer == Optimizer("adamw", 0.0, momentum=0.9)
    assert config.data["dataset"] == {"name": "cub", "root": str(tmp_path)}
    assert config.logger.wandb == "disabled"
    assert config.evaluation == ValidationConfig()


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("sed=1", "unknown key in config: 'sed'; did you mean 'seed'?"),
        ("phases[0].epoch=1", "unknown key in config.phases[0]: 'epoch'; did you mean 'epochs'?"),
        ("optimizer.nam=sgd", "unknown key in config.optimizer: 'nam'; did you mean 'name'?"),
        ("logger.wanbd=offline", "unknown key in config.logger: 'wanbd'; did you mean 'wandb'?"),
        ("attention.n_image=1", "unknown key in config.attention: 'n_image'; did you mean 'n_images'?"),
        ("evaluation.metric=[]", "unknown key in config.evaluation: 'metric'; did you mean 'metrics'?"),
        ("seed=a", "config.seed: Value 'a' of type 'str' could not be converted to Integer"),
        ("optimizer.name=sdg", "config.optimizer.name: Invalid value 'sdg', expected one of ['adam', 'adamw', 'sgd']"),
        (
            "phases[0].schedule=line",
            "config.phases[0].schedule: Invalid value 'line', expected one of ['constant', 'cosine', 'step']",
        ),
        ("phases[0].lrs.head=a", "config.phases[0].lrs.head: Value 'a' of type 'str' could not be converted to Float"),
        ("phases[0].eval_modules=head", "config.phases[0].eval_modules: expected a list, got 'head'"),
        ("model=cnn", "config.model: Cannot assign str to Dict[str, Any]"),
        ("phases={}", "config.phases: expected a list, got {}"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, assignment: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        check(TrainConfig, override(tiny_config(tmp_path), [assignment]))
    assert str(error.value) == expected


def test_numbers_of_learning_rates_are_floats(tmp_path: Path) -> None:
    config = check(TrainConfig, override(tiny_config(tmp_path), ["phases[0].lrs.head=1e-3", "optimizer.momentum=1"]))
    assert config.phases[0].lrs["head"] == 0.001
    assert type(config.phases[0].lrs["head"]) is float
    assert type(config.optimizer.momentum) is float


# Text and paths

ODD = [
    "007", "1e3", "on", "No", "0x10", "1_000", "2020-01-01", "12:30:00", "1:30", ".5", "true", "a b", "a: b", "a, b",
    "[a]", "[a", "{a: 1}", "{a", "a #1", "#1", "a=b", "O'Brien", '"', "- x", "@x", "%x", "*x", "!x", "&x", "a\\b", "..",
    "é \U0001f426",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_text_stays_text_on_the_command_line(text: str) -> None:
    """Where the schema says text: in the scripts' own, in that of the data set and the model, and in a mapping."""
    keys = ("experiment", "out", "data.dataset.root", "model.backbone", "phases[0].name")
    for key in keys:
        config = configured(TrainConfig, {"phases": [{}]}, [f"{key}={text}", "data.dataset.name=image_folder"])
        found = {
            "experiment": config.experiment,
            "out": config.out,
            "phases[0].name": config.phases[0].name,
            "data.dataset.root": data_options(vars(config_with(config)))["dataset"]["root"],
            "model.backbone": resolve(config_with(config)).model["backbone"],
        }[key]
        assert found == text
        assert type(found) is str


def config_with(config: TrainConfig) -> TrainConfig:
    """The config with a model and a root, if they are not given."""
    data = {**config.data, "dataset": {"root": "x", **config.data["dataset"]}}
    return replace(config, data=data, model={"name": "cnn", **config.model})


PLAIN = [text for text in ODD if text[0] not in '[{#"-@%*!&' and "#" not in text and ": " not in text]
"""Those that yaml reads as a scalar without quotes."""


@pytest.mark.parametrize("text", PLAIN)
def test_text_stays_text_in_a_file(tmp_path: Path, text: str) -> None:
    path = write(
        tmp_path / "c.yaml",
        f"experiment: {text}\nmodel:\n  name: cnn\n  backbone: {text}\nphases:\n  - eval_modules:\n    - {text}\n"
        f"data:\n  dataset:\n    name: image_folder\n    root: {text}\n",
    )
    config = resolve(configured(TrainConfig, path))
    found = [
        config.experiment,
        config.model["backbone"],
        config.data["dataset"]["root"],
        config.phases[0].eval_modules[0],
    ]
    assert found == [text] * 4
    save_yaml(tmp_path / "saved.yaml", as_dict(config))
    assert resolve(configured(TrainConfig, tmp_path / "saved.yaml")) == config
    assert load_yaml(tmp_path / "saved.yaml") == as_dict(config)


def test_quotes_and_null_on_the_command_line() -> None:
    config = configured(TrainConfig, {"out": "x"}, ["experiment='007'", "out=null", 'logger.project="a # b"'])
    assert (config.experiment, config.out, config.logger.project) == ("007", None, "a # b")
    assert configured(TrainConfig, {}, ["experiment=null", "out='null'"]).experiment == "null"
    assert configured(TrainConfig, {}, ["out='null'"]).out == "null"
    evaluation = configured(
        EvaluateConfig, {}, ["plugins=[007, '1e3', a/b]", "figure=[on]", "target=010", "grid=[7, 7]"]
    )
    assert (evaluation.plugins, evaluation.figure) == (["007", "1e3", "a/b"], ["on"])
    assert (evaluation.target, evaluation.grid) == (10, [7, 7])  # Any is read as yaml, but not as octal


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed=1:30", "config.seed: Value '1:30' of type 'str' could not be converted to Integer"),
        ("seed=3 # three", "config.seed: Value '3 # three' of type 'str' could not be converted to Integer"),
        ("phases=[1", "config.phases: '[1' is not valid yaml: expected ',' or ']'"),
        ("optimizer=adam", "config.optimizer: expected keys and values (name, weight_decay, "),
        (
            "out=~nobody_of_that_name/x",
            "config.out: '~nobody_of_that_name': there is no such home folder; write ./~nob",
        ),
    ],
)
def test_numbers_are_not_guessed(assignment: str, message: str) -> None:
    assert configured(TrainConfig, {}, ["seed=010"]).seed == 10
    with pytest.raises(InputError) as error:
        configured(TrainConfig, {}, [assignment])
    assert str(error.value).startswith(message)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(
        tmp_path / "c.yaml",
        "out: ~/run\nfeature_cache: ~/f\ndistillation: {teacher: ~/t}\nmodel: {name: cnn, weights: ~/w.pth}\n"
        "data: {dataset: {name: cub, root: ~}}\n",
    )
    config = resolve(configured(TrainConfig, path))
    assert (config.out, config.feature_cache, config.distillation.teacher) == tuple(
        f"{tmp_path}/{n}" for n in ("run", "f", "t")
    )
    assert (config.model["weights"], config.data["dataset"]["root"]) == (f"{tmp_path}/w.pth", str(tmp_path))
    evaluation = configured(EvaluateConfig, {}, ["out=./~x", "dataset.root=~/d"])
    assert evaluation.out == "./~x"
    node = run_config(Path(save(tmp_path / "r", config)))
    assert data_options(node, dataset=evaluation.dataset)["dataset"]["root"] == f"{tmp_path}/d"
    write(tmp_path / "d.yaml", "extends: ~/c.yaml\nout: ~other/~\n")
    assert load_yaml(tmp_path / "d.yaml")["feature_cache"] == "~/f"
    assert config_path("~/d.yaml") == tmp_path / "d.yaml"


def save(run: Path, config: TrainConfig) -> Path:
    run.mkdir()
    save_yaml(run / "config.yaml", as_dict(config))
    return run


def test_shipped_configs_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path(__file__).parents[1] / "configs/quickstart.yaml"
    assert config_path("configs/quickstart.yaml") == own
    write(tmp_path / "configs/quickstart.yaml", "")
    assert config_path("configs/quickstart.yaml") == Path("configs/quickstart.yaml")
    assert config_path("configs/none.yaml") == Path("configs/none.yaml")
    for name in ("cub/bcnn_lite0", "cub/bcnn_lite0.yaml", "configs/cub/bcnn_lite0", "configs/cub/bcnn_lite0.yaml"):
        assert config_path(name) == own.parent / "cub/bcnn_lite0.yaml"
    write(tmp_path / "cub/bcnn_lite0.yaml", "seed: 1\n")
    assert config_path("cub/bcnn_lite0") == Path("cub/bcnn_lite0.yaml")  # a file here comes first
    with pytest.raises(InputError, match=r"^config cub/bcn_lite0 does not exist, .*; did you mean 'cub/bcnn_lite0' or"):
        config_path("cub/bcn_lite0")
    with pytest.raises(InputError, match=r"^config zzz does not exist, .* shipped configs; --list shows them$"):
        config_path("zzz")


def test_a_file_extends_a_shipped_one(tmp_path: Path) -> None:
    top = write(tmp_path / "top.yaml", "extends: cub/cnn_lite0\nseed: 3\n")
    assert load_yaml(top) == {**load_yaml(config_path("cub/cnn_lite0")), "seed": 3}
    write(tmp_path / "cub/cnn_lite0", "seed: 1\nexperiment: own\n")
    assert load_yaml(top) == {"seed": 3, "experiment": "own"}


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("train.py", "python evaluate.py"),
        ("/a b/train.py", "python '/a b/evaluate.py'"),
        ("/env/bin/interp-train", "interp-evaluate"),
        ("/env/interp_models/__main__.py", "python -m interp_models evaluate"),
        ("", "python -m interp_models evaluate"),
    ],
)
def test_messages_name_the_command_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, called: str, expected: str
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert command("evaluate") == expected
    assert as_called("write python evaluate.py RUN") == f"write {expected} RUN"


def test_the_module_runs_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert main(["train", "--seed"]) == main(["trian"]) == 2
    assert main(["evaluate", "--list"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{__version__}\neval/all_methods ")
    assert err.splitlines()[1] == "error: unknown command 'trian'; did you mean 'train'?"


def test_everything_of_another_model_is_named_at_once() -> None:
    node = {
        "data": {"dataset": {"name": "part_birds"}},
        "model": {"name": "bcnn", "backbone": TINY, "weights": None, "n_maps": 2, "relu": False},
        "phases": [
            {"lrs": {"backbone": 1, "attention": 1}},
            {"lrs": {"head": 1}, "on_end": ["push"], "eval_modules": ["attention"]},
        ],
        "optimizer": {"weight_decays": {"attention": 0.1}},
    }
    assert resolve(configured(TrainConfig, {**node, "phases": [], "optimizer": {}})).model["n_maps"] == 2
    with pytest.raises(InputError) as error:
        resolve(configured(TrainConfig, node, ["model.name=cnn"]))
    message = str(error.value)
    for part in (
        "unknown key in model 'cnn': 'n_maps', 'relu' (known: backbone, dropout, label_smoothing, output_stride, we",
        "unknown parameter group in optimizer.weight_decays: 'attention' (known: backbone, head); ",
        "unknown parameter group in phases[0].lrs: 'attention' (known: backbone, head); ",
        "unknown action in phases[1].on_end: 'push' (known: reset_optimizer); ",
        "unknown module in phases[1].eval_modules: 'attention' (known: ",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(
        InputError, match=r"^unknown key in dataset 'part_birds': 'root', 'download' \(known: "
    ) as error:
        resolve(configured(TrainConfig, node, ["data.dataset.root=x", "data.dataset.download=true"]))


# Round trip


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    odd = [
        "1e-3", "1e3", "null", "~", "on", "No", "007", "1_000", "0x10", "2020-01-01", "12:30", "", " ", "a: b", "#",
        "é \U0001f426", "line\nbreak", "[1]", "{a}", "'", '"', "%", "@", "!tag", "*", "&a", "1.", ".5", "+1", "inf",
        "nan", "yes", "true", "-",
    ]  # fmt: skip
    numbers = [0, -1, 2**40, 0.1 + 0.2, 1e-5, 1e22, 5e-324, True, False, None, float("inf")]
    node = tiny_config(tmp_path, seed=7, experiment="1e-3")
    node["data"]["dataset"] |= {f"odd{i}": text for i, text in enumerate(odd)}
    node["model"]["values"] = [*numbers, odd, {text or "empty": text for text in odd}]
    config = check(TrainConfig, node)
    save_yaml(tmp_path / "config.yaml", as_dict(config))
    again = load_yaml(tmp_path / "config.yaml")
    assert again == as_dict(config)
    assert [type(value) for value in again["model"]["values"]] == [type(value) for value in node["model"]["values"]]
    assert check(TrainConfig, override(again, [])) == config
    assert list(again) == list(as_dict(config))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_config_of_a_run_reads_back_the_same(bcnn_run: Path, tiny_cub: Any) -> None:
    node = run_config(bcnn_run)
    phases = [{"epochs": 4, "lrs": BCNN_LRS}]
    config = resolve(check(TrainConfig, tiny_config(tiny_cub.root, out=str(bcnn_run), phases=phases)))
    assert node == as_dict(config)
    assert node["data"]["dataset"]["download"] is False  # defaults are written out
    assert node["model"]["n_maps"] == 3
    assert check(TrainConfig, node) == config


# Help


def test_description_names_every_key_with_type_default_and_meaning() -> None:
    lines = [line.strip() for line in describe(TrainConfig).splitlines()]
    assert "seed: int = 0   Seed of everything random." in lines
    assert "out: str | None = None   Run folder; null makes runs/<experiment>/<seed>-<n>." in lines
    assert "phases[i].   The phases of the training, in their order." in lines
    lrs = (
        "lrs: dict[str, float] = {}   Peak learning rate of each parameter group; groups that are not named are frozen."
    )
    assert lrs in lines
    assert "name: Literal['adam', 'adamw', 'sgd'] = adamw   Algorithm." in lines
    assert "momentum: float = 0.9   Momentum of `sgd`." in lines
    inherited = [line.strip() for line in describe(EvaluateConfig).splitlines()]
    presets = "`gomez2023`, `saliency-maps-metrics`, `rise`, `opticam`, `guidance` or `idsds`"
    assert f"preset: str = gomez2023   Protocol of the metrics: {presets}." in inherited
    ckpt = "ckpt: Literal['best', 'last'] = best   Checkpoint of each run: `best` validation epoch or `last` epoch."
    assert ckpt in inherited
