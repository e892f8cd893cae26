"""Settings: their names, their spelling on the command line, and what each may be."""

import ast
import contextlib
import importlib
import itertools
import json
import re

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_run import ROOT, changed, refused

from crossdict_jax import config as room
from crossdict_jax import models
from crossdict_jax.config import BenchmarkConfig, Config, LossWeights, VerifyConfig, settings
from crossdict_jax.evaluation.matching import METHODS
from crossdict_jax.workdir import write_json

PRESETS = sorted({p.stem for p in (ROOT / "configs").glob("*.py")} - {"stored", "convert"})
# The first reads a work directory, the second says nothing about what to convert.
KINDS = (Config, room.PretrainConfig, room.ConvertConfig, VerifyConfig, BenchmarkConfig)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_allowed_and_survive_json(preset):
    module = importlib.import_module(f"configs.{preset}")
    config = module.get_config()
    settings.validate(config)
    assert settings.from_dict(type(config), json.loads(json.dumps(room.to_dict(config)))) == config
    assert f"--config=configs/{preset}.py" in module.__doc__ or preset == "quickstart"


def test_every_setting_has_a_help_text_and_a_rule():
    free = {"layer_pairs", "probe.source", "hook_name", "model_name", "push"}  # text of any kind
    free |= {"steer.source", "steer.target", "steer.layer_pair", "steer.prompts", "machine"}
    for kind in KINDS:
        for name, field in settings.settings(kind).items():
            assert field.metadata["help"], name
            assert field.metadata["rule"] or name in free, name


def reads(tree: ast.Module) -> set[str]:
    """Every attribute that a module reads, and every name; not those of classes of settings."""
    body = [n for n in tree.body if not (isinstance(n, ast.ClassDef) and "Config" in n.name)]
    nodes = list(itertools.chain.from_iterable(map(ast.walk, body)))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return read | {n.id for n in nodes if isinstance(n, ast.Name)}


def test_every_setting_is_read_somewhere():
    """By a file that also names the group of the setting, or a class of settings."""
    classes = {name for name in vars(room) if name.endswith("Config")}
    sources = [p for d in ("crossdict_jax", "launch") for p in (ROOT / d).rglob("*.py")]
    files = [reads(ast.parse(path.read_text())) for path in sources]
    unread = []
    for name in itertools.chain.from_iterable(map(settings.settings, KINDS)):
        group, last = (["", *name.split(".")])[-2:]
        near = {group or "config", "settings", *classes}
        if not any(last in read and read & near for read in files):
            unread.append(name)
    assert not unread, f"Nothing reads {', '.join(unread)}: drop them, or let them act."


def test_names_found_by_file_are_those_of_the_rooms():
    assert set(room.SITES) == set(models.KINDS)
    matching = settings.settings(Config)["evaluation.matching"].metadata["rule"]
    assert matching.words == f"one of {', '.join(METHODS)}"
    assert VerifyConfig().gates == tuple(f"G{n}" for n in range(1, 11))


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(st.characters(exclude_characters=",", exclude_categories=["Cc", "Z"]), min_size=1)
SPELLED = {
    int: st.integers(),
    float: FLOATS,
    str: st.text(),
    tuple[int, ...]: st.lists(st.integers()).map(tuple),
    tuple[float, ...]: st.lists(FLOATS).map(tuple),
    tuple[str, ...]: st.lists(NAMES).map(tuple),
    room.Number: FLOATS | st.lists(FLOATS, min_size=2).map(tuple),
    room.Count: st.integers() | st.lists(st.integers(), min_size=2).map(tuple),
}


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines
@given(st.sampled_from(list(SPELLED)).flatmap(lambda kind: st.tuples(st.just(kind), SPELLED[kind])))
def test_what_is_spelled_is_parsed_back(kind_and_value):
    kind, value = kind_and_value
    assert settings.parse(kind, settings.spell(value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (tuple[int, ...], "(5, 6,7)", (5, 6, 7)),
        (tuple[int, ...], "[5,]", (5,)),
        (tuple[str, ...], "/a/b.c, ../d-e,hub/id", ("/a/b.c", "../d-e", "hub/id")),
        (room.Number, "1e-3", 1e-3),
        (room.Count, "64,128", (64, 128)),
        *((tuple[int, ...], text, None) for text in ("5,x", "5,,6")),
        *((room.Count, "1e3", None), (int, "1.5", None), (float, "fast", None)),
    ],
)
def test_spellings_of_people_are_understood_or_refused(kind, text, value):
    with pytest.raises(ValueError, match="is not") if value is None else contextlib.nullcontext():
        parsed = settings.parse(kind, text)
        assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not room.ConvertConfig])
def test_a_file_of_settings_tells_its_class(kind, tmp_path):
    settings.validate(kind())
    write_json(tmp_path / "config.json", room.to_dict(kind(seed=3)))
    assert settings.read(tmp_path / "config.json") == kind(seed=3)
    for tree in ({"sede": 0}, {"text": 5}, {"seed": {"a": 1}}, []):
        refused(r"[sS]etting", settings.from_dict, kind, tree)


REFUSED = [  # setting, value, what the line names
    ("models", ("one",), "models=one"),
    ("models", ("a", " "), "models=a, "),
    ("layers", (), "layers is empty"),
    ("layers", (-1,), "layers=-1"),
    ("layer_pairs", "6-10", "layer_pairs=6-10"),
    ("layer_pairs", "6:10,6:10", "twice"),
    ("site", "resid_mid", "resid_post"),
    ("seed", -1, "seed=-1"),
    ("text__source", " ", "text.source= "),
    ("text__test_fraction", 1.0, "text.test_fraction=1.0"),
    ("text__validation_fraction", 0.9, "below 1"),
    ("extract__matmul_dtype", "float16", "bfloat16"),
    ("extract__norm_mask", float("inf"), "extract.norm_mask=inf"),
    ("sae__learning_rate", (1e-3, 1e308), "1e+308 must lie between -1e+300 and 1e+300"),
    ("seed", -(10**30), "must lie between -9.22337e+18 and"),
    ("sae__architecture", "transcoder", "topk"),
    ("sae__width", 0, "sae.width=0 must be 1 or more"),
    ("sae__steps", 2**31, "sae.steps=2147483648 must lie between"),
    ("sae__steps", 2.5, "sae.steps=2.5"),
    ("sae__learning_rate", (1e-3, -1e-3), "sae.learning_rate=0.001,-0.001: -0.001"),
    ("steer__search", " ", "steer.search= "),
    ("map__kinds", ("mean", "rigde"), "rigde must be one of"),
    ("map__ridge_penalties", (0.0,), "map.ridge_penalties=0.0"),
    ("map__dropout", 1.0, "map.dropout=1.0"),
    ("crosscoder__l1_coefficient", 3.0, "nothing to crosscoder.variant=batchtopk"),
    ("map__loss_weights", LossWeights(0, 0, 0, 0), "map.loss_weights are all 0"),
    ("evaluation__matching", "best", "mutual_best, hungarian"),
    ("evaluation__bootstrap", 9, "evaluation.bootstrap=9 must be 10 or more"),
    ("evaluation__pool", 1, "evaluation.pool=1 must be 0, or 2 or more"),
    ("evaluation__similarity_rows", 10, "evaluation.similarity_rows=10 must be 0 or 20"),
]


@pytest.mark.parametrize(("name", "value", "named"), REFUSED)
def test_refused_settings_are_named(name, value, named):
    refused(re.escape(named), settings.validate, changed(Config(), **{name: value}))


def test_misspelt_names_get_the_closest():
    meant = {"sae.widht": "did you mean sae.width?", "width": "did you mean sae.width?"}
    meant |= {"layres": "did you mean layers?", "text": "text.source", "zzz": "models, layers"}
    for name, words in meant.items():
        line = refused(repr(name).replace(".", "[.]"), settings.check_name, Config, name)
        assert words in line


def test_layer_pairs_stand_in_for_layers():
    assert room.layer_pairs(Config(layers=(5, 6))) == ((5, 5), (6, 6))
    config = Config(models=("a", "b", "c"), layers=(1,), layer_pairs="6:10, 7:5")
    assert room.layer_pairs(config) == ((6, 10), (7, 5))
    assert room.model_layers(config) == ((6, 7), (5, 10), (5, 10))
