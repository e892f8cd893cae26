"""Hostile input: every reader of files and settings, through the functions that commands call.

    python tests/fuzz.py [--cases=7500] [--seed=0] [--only=WORD]

A case is a valid folder, one or two files of it altered: as bytes, as JSON, as headers and as
links. It must end well or with a UserError, read nothing outside of its folder, and run nothing.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import fault_table  # first: it says where the package is, and that JAX takes the CPU
import numpy as np
import pyarrow
import pyarrow.parquet
import test_exchange as exchange
import test_models
import test_report
import tiny_run
from safetensors.numpy import load, save

from crossdict_jax import dictionaries, maps, models, results, workdir
from crossdict_jax.activations.pairing import byte_ends
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.text import load_corpus
from crossdict_jax.config import Config, ConvertConfig, TextConfig, to_dict
from crossdict_jax.dictionaries import formats
from crossdict_jax.dictionaries.folders import site_of
from crossdict_jax.errors import UserError
from crossdict_jax.training.stage import digest
from launch import command

ROOT = fault_table.ROOT
OUTSIDE = "outside-of-the-folder"  # what bears this name must not be opened
DEEP = functools.reduce(lambda inner, _: [inner], range(200), 0)
HOSTILE = (None, True, False, 0, 1, -1, 3, 0.5, 2**31, 2**63, 10**400, 1e308, float("inf"))
HOSTILE += (float("nan"), "", "a", ".", f"../{OUTSIDE}", f"/tmp/{OUTSIDE}", "\0", "\ud800", "٣")
HOSTILE += ("<script>", "9" * 5000, "x" * 300, "~nobody/x", [], {}, [[]], [None], {"a": 1}, DEEP)
RUNS_CODE = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
RUNS_CODE += ("socket.connect", "socket.getaddrinfo", "ctypes.dlopen")
SECONDS = 30  # that a case may take
GOOD = ("well", "refused")
violations: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: notes what opens a file outside, runs code or calls somebody."""
    # But for matplotlib's first look at the fonts, and the process's own symbols.
    if arguments[:1] in (("fc-list",), (None,)):
        return
    if event in RUNS_CODE or (event == "open" and OUTSIDE in str(arguments[0])):
        violations.append(f"{event} {arguments[0]!s:.80}")


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randint(0, len(data)), draw.choice((1, 2, 4, 8, 64))
        rest, number = data[at + size :], draw.choice((0, -1, 1, 2**31 - 1, 2**40, 2**63 - 1))
        flipped = bytes(b ^ 1 << draw.randrange(8) for b in data[at : at + 1])
        ways = [flipped + data[at + 1 :], b"", rest, 2 * data[at : at + size] + rest]
        ways += [draw.randbytes(size) + rest, struct.pack("<q", number)[:size] + rest]
        ways += [str(draw.choice(HOSTILE)).encode(errors="surrogatepass") + rest]
        data = data[:at] + draw.choice(ways)
    return data


def mutated_tree(draw: random.Random, tree):
    """A JSON value, altered at one place."""
    nodes = [([tree], 0)]
    for parent, key in nodes:  # grows
        inner = parent[key]
        if isinstance(inner, (dict, list)):
            nodes += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
    parent, key = draw.choice(nodes)
    value, old = draw.choice(HOSTILE), parent[key]
    number = isinstance(old, (int, float)) and old * draw.choice((-1, 2, 0.5, 1e9))
    new = draw.choice((value, value, [old], {"a": old}, str(old), number or value))
    if isinstance(parent, dict) and draw.random() < 0.3:
        del parent[key]
        key = draw.choice((key, str(value), draw.choice(list(parent) or ["a"])))
    parent[key] = new
    return nodes[0][0][0]


def mutated(draw: random.Random, name: str, data: bytes) -> bytes:
    """A file's bytes, altered as whoever knows its format would."""
    with contextlib.suppress(ValueError, KeyError, zipfile.BadZipFile, RecursionError):
        if draw.random() < 0.3:
            pass
        elif name.endswith(".safetensors"):
            size = int.from_bytes(data[:8], "little")
            header = mutated_tree(draw, json.loads(data[8 : 8 + size]))
            header = json.dumps(header).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + size :]
        elif name.endswith(".npz"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = {n: archive.read(n) for n in archive.namelist()}
            at, out = draw.choice(list(members)), io.BytesIO()
            members[at] = mutated_bytes(draw, members[at])
            with zipfile.ZipFile(out, "w", draw.choice((0, 8))) as archive:
                for member, content in members.items():
                    archive.writestr(member, content)
            return out.getvalue()
        elif name.endswith(".jsonl"):
            lines = data.splitlines()
            at = draw.randrange(len(lines))
            lines[at] = json.dumps(mutated_tree(draw, json.loads(lines[at]))).encode()
            return b"\n".join(lines)
        elif data[:1] in (b"{", b"["):
            return json.dumps(mutated_tree(draw, json.loads(data))).encode()
    return mutated_bytes(draw, data)


def written(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def altered(draw: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    """Writes a folder of these files, one or two of them altered or put in the way."""
    written(folder, files)
    for name in draw.sample(sorted(files), draw.randint(1, min(2, len(files)))):
        file, kind = folder / name, draw.random()
        if kind > 0.1 or (len(files) == 1 and not name.startswith("t.")):  # the user's own
            file.write_bytes(mutated(draw, name, files[name]))
            continue
        file.unlink()
        outside = folder.parent / f"{OUTSIDE}{file.suffix}"
        if kind > 0.08:
            file.mkdir()
        elif kind > 0.06:
            file.write_bytes(b"")
        elif kind > 0.03:
            outside.write_bytes(files[name])
            file.symlink_to(outside)


def folder_files(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    files = (f for f in sorted(folder.glob(pattern)) if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@functools.cache
def lab():
    """A finished tiny run; (its config, its work directory)."""
    return tiny_run.make_run(Path(tempfile.mkdtemp()) / "lab")


def settings_seeds():
    config = to_dict(Config(models=("a", "b")))
    argv = [f"--config.{k}={v}" for k, v in (("sae.width", 64), ("layers", "1,2"), ("seed", 3))]
    argv += ["--config.map.kinds=mean,ridge", "--models=a,b", "--config.sae.l1_coefficient=1e-3"]
    source = (ROOT / "configs/three_models.py").read_bytes()
    lines = "\n".join([*argv, "--verbosity=-1"]).encode()
    return {"config.py": source, "config.json": json.dumps(config).encode(), "argv": lines}


def parsed(*argv):
    config, where, _ = command.parse(["x", *argv])
    command.check(config)
    return config, where


def read_workdir(folder):
    config, where = parsed(f"--workdir={folder}")
    workdir.open_workdir(where, to_dict(config), usual=to_dict(Config()))


def text_seeds(suffix):
    texts = tiny_run.make_texts(40)
    if suffix == "txt":
        return [{f"t.{i}.txt": "\n\n".join(texts[i:]).encode() for i in range(40)}]
    if suffix == "jsonl":
        return [{"t.0.jsonl": "\n".join(json.dumps({"text": t, "n": [1]}) for t in texts).encode()}]
    files = []
    for compression in ("none", "snappy", "zstd", "gzip"):
        table = pyarrow.table({"n": list(range(40)), "text": texts})
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, compression=compression)
        files.append({"t.0.parquet": file.getvalue()})
    return files


def read_text(folder):
    for source in (folder, *(f for f in folder.glob("t.0.*") if not f.is_symlink())):
        load_corpus(TextConfig(source=str(source), documents=30, max_bytes=200))


def read_tokenizer(folder):
    byte_ends("abc de fgh, <|endoftext|> ä", models.load_tokenizer(folder))


def of_models(*names: str, pattern: str) -> list[dict[str, bytes]]:
    """The files of the run's language models a and b, or of a Llama beside them."""
    root = Path(lab()[0].models[0]).parent
    if "c" in names:
        models.save(models.init(test_models.NARROW_LLAMA), root / "c")
    return [folder_files(root / name, pattern) for name in names]


def model_seeds():
    return of_models(*"abc", pattern="[cm]*.*")


def sharded():
    out = []
    for files in model_seeds():
        shards, where = ({}, {}), {}
        for i, (name, tensor) in enumerate(load(files["model.safetensors"]).items()):
            shards[i % 2][name], where[name] = tensor, f"model-{i % 2}.safetensors"
        made = {f"model-{i}.safetensors": save(shard) for i, shard in enumerate(shards)}
        made["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
        out.append({"config.json": files["config.json"]} | made)
    return out


def dictionary_seeds(root, tool):
    made = exchange.weights("b_enc", "threshold", "topk_threshold")
    plain = {n: made[n] for n in ("W_enc", "W_dec", "b_dec", "b_enc")}
    if tool == "SAELens":
        for kind in ("standard", "topk", "jumprelu", "batchtopk", "transcoder"):
            config = {"architecture": kind, "k": 3, "metadata": exchange.HOOK, "d_out": exchange.D}
            arrays = plain | {n: made[n] for n in exchange.NAMES.get(kind, ())}
            scaler = {"scaling_factor": 1.0 if kind == "transcoder" else 2.0}
            exchange.saelens_folder(root / kind, arrays, scaler=scaler, **config)
        return [folder_files(folder) for folder in sorted(root.iterdir())]
    if tool == "sparsify":
        return [folder_files(exchange.sparsify_folder(root / "d", plain, **exchange.SPARSIFY))]
    first, arrays = io.BytesIO(), plain | {"threshold": made["threshold"]}
    np.savez(first, **arrays)
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.4.output"}
    config |= {"hf_hook_point_out": "model.layers.4.mlp.output", "model_name": "m"}
    second = {"params.safetensors": save({n.replace("W_", "w_"): a for n, a in arrays.items()})}
    return [{"params.npz": first.getvalue()}, second | {"config.json": json.dumps(config).encode()}]


def read_dictionary(folder):
    site_of(formats.names(folder).get("hook_name", ""))
    formats.load(folder)


def ours(*inside: str) -> list[dict[str, bytes]]:
    """Parts of the tiny run: a dictionary, with every one of its maps in turn, or the store."""
    root = lab()[1].root
    always = folder_files(root, inside[0]) if len(inside) > 1 else {}
    return [
        always | folder_files(root, f"{f.relative_to(root)}/**/*")
        for f in sorted(root.glob(inside[-1]))
    ]


def seal_again(folder):
    """Writes the checksums of what is there: as somebody who means harm would."""
    for seal in folder.glob("**/*.sha256.json"):
        workdir.write_json(seal, workdir.folder_digests(seal.with_name(seal.name.split(".")[0])))
    for seal in folder.glob("results/checksums.json"):
        sums = {n: workdir.file_digest(seal.with_name(n)) for n in workdir.read_json(seal)}
        workdir.write_json(seal, sums)
    store = folder / "activations"
    if (store / "meta.json").exists():
        meta = workdir.read_json(store / "meta.json")
        sums = {n: workdir.file_digest(store / n) for n in folder_files(store, "**/*.npy")}
        meta = {k: v for k, v in meta.items() if k != "seal"} | {"checksums": sums}
        workdir.write_json(store / "meta.json", meta | {"seal": digest(meta)})


def read_ours(folder):
    if (folder / "activations").exists():
        store = open_store(folder / "activations")
        for model in store.models:
            for site in store.sites_of(model):
                store.read(model, site, store.select("train")[:5])
    for path in folder.glob("dictionaries/*/*/*"):
        dictionaries.load(path)
    for path in folder.glob("maps/*/*/*"):
        maps.load(path)


def result_seeds():
    work = test_report.write_run(Path(tempfile.mkdtemp()))
    config = Config(models=test_report.MODELS, layers=(5, 6, 7))
    workdir.write_json(work.root / "config.json", to_dict(config))
    sums = {f.name: workdir.file_digest(f) for f in work.results.glob("*.jsonl")}
    workdir.write_json(work.result("checksums.json"), sums)
    return [folder_files(work.root)]


def read_results(folder):
    for file in sorted((folder / "results").glob("*.jsonl")):
        results.read(workdir.Workdir(folder), file.name)


def by_command(name, *argv):
    """Reads a folder by a whole command; its one line is a UserError."""

    def read(folder):
        kind = ConvertConfig if name == "convert" else Config
        asked = [a.format(folder) for a in argv if a != "argv"]
        if "argv" in argv:  # a command line alone: what it asks for is not done
            lines = (folder / "argv").read_bytes().replace(b"\0", b"").splitlines()
            asked += map(os.fsdecode, lines)
        main = print if "argv" in argv else importlib.import_module(f"launch.{name}").main
        told = io.StringIO()
        settings = {"kind": kind, "default": "convert" if name == "convert" else "quickstart"}
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = command.execute(main, ["x", *asked], **settings)
        if code == 2 and len(told.getvalue().splitlines()) == 1:
            raise UserError(told.getvalue().strip())
        assert (code, told.getvalue()) == (0, ""), (code, told.getvalue())

    return read


def readers() -> dict[str, tuple]:
    """{name: (seeds() -> valid folders {file: bytes}, read(folder), share of the cases)}."""
    setting = lambda name: lambda: [{name: settings_seeds()[name]}]  # noqa: E731
    tool = lambda name: lambda: dictionary_seeds(Path(tempfile.mkdtemp()), name)  # noqa: E731
    text = lambda suffix: lambda: text_seeds(suffix)  # noqa: E731
    run = "--workdir={0}"
    argv = lambda f: parsed(*map(os.fsdecode, (f / "argv").read_bytes().splitlines()))  # noqa: E731
    # Models, tokenizers and text, as extract_activations reads them.
    whole = lambda: [of_models("", pattern="[ab]/*")[0] | text_seeds("jsonl")[0]]  # noqa: E731
    listed = {
        "config file": (setting("config.py"), lambda f: parsed(f"--config={f}/config.py"), 1),
        "config.json": (setting("config.json"), read_workdir, 1),
        "command line": (setting("argv"), argv, 1),
        **{f"text {s}": (text(s), read_text, 1) for s in ("txt", "jsonl", "parquet")},
        "tokenizer": (lambda: of_models(*"ab", pattern="*.json"), read_tokenizer, 1),
        "safetensors": (model_seeds, models.load, 1),
        "safetensors index": (sharded, models.load, 1),
        **{t: (tool(t), read_dictionary, 1) for t in ("SAELens", "sparsify", "Gemma Scope")},
        "own checkpoint": (lambda: ours("dictionaries/**/*", "maps/*/*/*"), read_ours, 1),
        "own store": (lambda: ours("activations"), read_ours, 1),
        "result file": (result_seeds, read_results, 1),
    }
    source, out = "--config.source={0}", "--workdir={0}/out"
    text_run = ("--models={0}/a,{0}/b", "--layers=1", "--config.text.source={0}/t.0.jsonl", out)
    commands = {
        "experiment": (setting("argv"), ("argv", out)),
        "convert": (tool("SAELens"), (source, out, "--config.format=crossdict")),
        "extract_activations": (whole, (*text_run, "--config.text.documents=30")),
        "evaluate": (lambda: [folder_files(lab()[1].root)], (run,)),
        "report": (result_seeds, (run,)),
    }
    for name, (seeds, asked) in commands.items():
        listed[f"command {name}"] = (seeds, by_command(name, *asked), 40 / 7500)
    return listed


def attempt(read, draw: random.Random, seeds: list[dict[str, bytes]]) -> str:
    """One case: "well", "refused", or what went wrong and where."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    with tempfile.TemporaryDirectory() as folder:
        folder, outcome = Path(folder) / "run", "well"
        folder.mkdir()
        altered(draw, folder, draw.choice(seeds))
        if draw.random() < 0.5:
            with contextlib.suppress(UserError, OSError, ValueError, AttributeError):
                seal_again(folder)
        signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        violations.clear()
        try:
            read(folder)
        except UserError:
            outcome = "refused"
        except BaseException as error:
            told = "" if isinstance(error, MemoryError) else command._machine_words(error)
            calls = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/" not in f[0]]
            at = " > ".join(f"{Path(f[0]).name}:{f[1]}" for f in calls if str(ROOT) in f[0])
            outcome = "refused" if told else f"{type(error).__name__} ({error!s:.90}) at {at}"
        finally:
            signal.alarm(0)
    return f"{violations[0]} ({outcome})" if violations else outcome


def cases(name: str, numbers, *, seed: int):
    """Yields (number, outcome) of cases of a reader; each depends on its own number alone."""
    seeds, read, _ = readers()[name]
    seeds = seeds()
    for valid in seeds if 0 in numbers else ():
        with tempfile.TemporaryDirectory() as folder:
            written(Path(folder), valid)
            read(Path(folder))  # what is not altered is read
    for number in numbers:
        yield number, attempt(read, random.Random(f"{seed} {name} {number}"), seeds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("cases", 7500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help="readers whose names hold this word")
    asked, total, names = parser.parse_args(), Counter(), ("cases", "well", "refused", "failed")
    print(f"{'reader':28}" + "".join(f"{name:>9}" for name in names), flush=True)
    for name, (_, _, share) in readers().items():
        if asked.only not in name:
            continue
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            kinds, first, log = Counter(), {}, Path(folder) / "log"

            def call(name=name, share=share, folder=folder):
                tempfile.tempdir = folder
                used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30),) * 2)
                with open(f"{folder}/outcomes", "w", buffering=1) as file:
                    numbers = range(max(1, round(asked.cases * share)))
                    for each in cases(name, numbers, seed=asked.seed):
                        file.write(json.dumps(each) + "\n")

            code = fault_table.wait(fault_table.fork(call, log))
            for line in Path(f"{folder}/outcomes").read_text().splitlines():
                number, outcome = json.loads(line)
                kinds[outcome if outcome in GOOD else "failed"] += 1
                if outcome not in GOOD:
                    first.setdefault(outcome.rpartition(" at ")[2], f"case {number}: {outcome}")
            if code:
                kinds["failed"] += 1
                first["end"] = f"ended by {code}: {Path(f'{log}.err').read_text()[-300:]}"
        kinds["cases"] = kinds.total()
        total.update(kinds)
        print(f"{name:28}" + "".join(f"{kinds[n]:9}" for n in names), *first.values(), sep="\n  ")
    print(f"{'together':28}" + "".join(f"{total[n]:9}" for n in names))
    return total["failed"] > 0


sys.addaudithook(watch)
if __name__ == "__main__":
    fault_table.prepare()
    sys.exit(main())
