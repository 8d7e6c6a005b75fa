"""Checkpoints that leave open which files are the model.

The oracle is Python itself: an audit hook of a process of its own lists the files that are opened inside the
checkpoint while the float model is loaded; all of them are in the fingerprint, and nothing else is read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from lines import cli, environment, make_project
from safetensors.torch import load_file, save_file
from tiny_nets import save_net
from tiny_vit import save_vit
from transformers import GPT2LMHeadModel

from qcompress.errors import ModelError
from qcompress.models import FAMILIES
from qcompress.models.architecture import CAUSAL_LM, Head
from qcompress.models.checkpoint_files import read_tensors
from qcompress.models.readers import check_reader
from qcompress.pipeline.stages.load import fingerprint, load
from qcompress.schema.families import DISCOVERED
from qcompress.schema.recipe import Model

pytestmark = pytest.mark.attack("checkpoints whose loaded files are not the hashed ones")

TEXTS = ("bert", "roberta", "distilbert")
STATED = [name for name in FAMILIES if name not in DISCOVERED.values()]

CHILD = """
import sys
from pathlib import Path
from qcompress.models import FAMILIES, load_processor, load_tokenizer
family, source = sys.argv[1], Path(sys.argv[2]).resolve()
FAMILIES[family].load_float  # imports done
import transformers, torch
opened = set()
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())
        if path.parent == source:
            opened.add(path.name)
sys.addaudithook(hook)
FAMILIES[family].load_float(source)
print("OPENED", *sorted(opened))
"""


def opened(family: str, source: Path) -> set[str]:
    """Names of files of a checkpoint that Python opens; Rust's safetensors opens the weights by itself."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, family, source], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split()[1:])


def decoys(source: Path) -> None:
    """Files that transformers reads where it is given a directory, or that another tool would take."""
    weights = source / "model.safetensors"
    for name in ("model.fp16.safetensors", "other.safetensors", "model-00001-of-00001.safetensors"):
        shutil.copyfile(weights, source / name)
    for name in ("generation_config.json", "config.4.0.0.json", "quant_config.json", "modeling_evil.py"):
        (source / name).write_text('{"max_length": "x", "bad": }')
    (source / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    for name in ("tokenizer.model", "pytorch_model.bin", "model.gguf", "tekken.json"):
        (source / name).write_bytes(b"\x80\x04.")


def checkpoint(family: str, tiny_model: Path, folder: Path) -> Path:
    """A small checkpoint of a family."""
    source = folder / "model"
    if family == "gpt2":
        shutil.copytree(tiny_model, source)
    elif family == "vit":
        save_vit(source)
    else:
        save_net(source, {"resnet": "basic", "cifar-resnet": "cifar"}[family])
    return source


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "vit", "resnet", "cifar-resnet"])
def test_what_is_opened_is_what_was_hashed(family: str, tiny_model: Path, tmp_path: Path) -> None:
    source = checkpoint(family, tiny_model, tmp_path)
    decoys(source)
    assert opened(family, source) <= set(fingerprint(source))


def plus_one(source: Path) -> None:
    """Other weights in a new file of the same size."""
    tensors = load_file(source / "model.safetensors")
    other = {name: value + 1 if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(other, source / "new", {"format": "pt"})
    (source / "new").replace(source / "model.safetensors")


def one_bit(source: Path) -> None:
    """One bit in the same file, with the time of before."""
    weights = source / "model.safetensors"
    state, content = weights.stat(), bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [plus_one, one_bit])
@pytest.mark.parametrize(
    "family", [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in STATED]
)
def test_weights_that_change_after_they_were_hashed_are_not_loaded(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, change: Callable[[Path], None]
) -> None:
    source, out = tmp_path / "model", tmp_path / "load"
    shutil.copytree(checkpoints[family], source)
    out.mkdir()
    task = "sequence-classification" if family in TEXTS else "image-classification"
    head = CAUSAL_LM if family == "gpt2" else Head(task, None, None)
    resize = {"do_resize": True, "size": {"height": 32, "width": 32}}
    steps = {
        "image_processor_type": "ViTImageProcessor",
        **(resize if family == "resnet" else {"do_resize": False}),
    }
    images = None if family in ("gpt2", *TEXTS) else steps
    load(Model(family=family, source="x"), source, fingerprint(source), out, head, 0, images)
    FAMILIES[family].load_float(source, out)
    change(source)
    with pytest.raises(ModelError, match="model.safetensors was changed after it was hashed"):
        FAMILIES[family].load_float(source, out)


def test_weights_under_a_name_that_was_not_hashed_are_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "load"
    shutil.copytree(tiny_model, source)
    out.mkdir()
    load(Model(family="gpt2", source="x"), source, fingerprint(source), out, CAUSAL_LM)
    (source / "model.safetensors").rename(source / "other.safetensors")
    names = dict.fromkeys(load_file(source / "other.safetensors"), "other.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match="other.safetensors was changed after it was hashed"):
        FAMILIES["gpt2"].load_float(source, out)


@pytest.mark.slow
def test_shards_are_hashed_and_loaded(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(source, max_shard_size="100KB")
    assert opened("gpt2", source) <= set(fingerprint(source))
    shard = sorted(source.glob("model-*.safetensors"))[0].name
    before = fingerprint(source)
    (source / "generation_config.json").write_text("{}")
    assert shard in before and fingerprint(source) == before


def configure(**values: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        file = source / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def tokenizer(**values: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        file = source / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def beside(shards: int) -> Callable[[Path], None]:
    """An index beside the single file; the shards hold the same tensors."""

    def change(source: Path) -> None:
        model = GPT2LMHeadModel.from_pretrained(source)
        whole = (source / "model.safetensors").read_bytes()
        model.save_pretrained(source, max_shard_size="100KB" if shards > 1 else "10GB")
        (source / "model.safetensors").write_bytes(whole)
        if shards == 1:
            shutil.copyfile(source / "model.safetensors", source / "model-1.safetensors")
            names = list(model.state_dict())
            weight_map = {name: "model-1.safetensors" for name in names}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (source / "model.safetensors.index.json").write_text(text)

    return change


def twice(source: Path) -> None:
    """Two shards that hold every tensor."""
    names = list(GPT2LMHeadModel.from_pretrained(source).state_dict())
    names = [name for name in names if name != "lm_head.weight"]
    shutil.copyfile(source / "model.safetensors", source / "a.safetensors")
    (source / "model.safetensors").rename(source / "b.safetensors")
    weight_map = {name: f"{'ab'[place % 2]}.safetensors" for place, name in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def distributed(source: Path) -> None:
    """A file that transformers takes before model.safetensors."""
    shutil.copyfile(source / "model.safetensors", source / "shard-00001-model-00001-of-00001.safetensors")


def adapter(**values: object) -> Callable[[Path], object]:
    return lambda source: (source / "adapter_config.json").write_text(json.dumps(values))


AMBIGUOUS: dict[str, tuple[Callable[[Path], object], str]] = {
    "index beside the single file": (beside(1), "model.safetensors.index.json"),
    "shards beside the single file": (beside(2), "model.safetensors.index.json"),
    "transformers_weights": (configure(transformers_weights="other.safetensors"), "transformers_weights"),
    "weights elsewhere": (configure(transformers_weights="../m.safetensors"), "transformers_weights"),
    "weights of an index": (
        configure(transformers_weights="b.safetensors.index.json"),
        "transformers_weights",
    ),
    "configuration_files": (configure(configuration_files=["config.4.0.0.json"]), "configuration_files"),
    "code of a model": (configure(auto_map={"AutoModelForCausalLM": "evil.Evil"}), "auto_map"),
    "code of a config": (configure(auto_map={"AutoConfig": "a/b--evil.Evil"}), "auto_map"),
    "fusion": (configure(fusion_config={"rms_norm": True}), "fusion_config"),
    "kernels": (configure(kernel_config={"a": 1}), "kernel_config"),
    "attention from the hub": (configure(attn_implementation="kernels-community/x"), "attn_implementation"),
    "the same, private": (configure(_attn_implementation="a/b@main:c"), "_attn_implementation"),
    "quantized": (configure(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    "compressed": (configure(compression_config={"format": "pack-quantized"}), "compression_config"),
    "of timm": (configure(pretrained_cfg={"url": "x"}), "pretrained_cfg"),
    "tuples": (configure(return_dict=False), "return_dict"),
    "one tensor twice": (twice, "is in a.safetensors and in b.safetensors"),
    "a tokenizer of another file": (tokenizer(gguf_file="m.gguf"), "gguf_file"),
    "a vocabulary elsewhere": (tokenizer(vocab_file="/etc/vocab.json"), "vocab_file"),
    "a vocabulary of another name": (tokenizer(vocab_file="other.json"), "vocab_file"),
    "merges elsewhere": (tokenizer(merges_file="../m.txt"), "merges_file"),
    "sentencepiece": (tokenizer(spm_file="spiece.model"), "spm_file"),
    "arguments of a tokenizer": (tokenizer(init_inputs=["/etc/x"]), "init_inputs"),
    "old tuples": (configure(use_return_dict=False), "use_return_dict"),
    "traced": (configure(torchscript=True), "torchscript"),
    "a distributed checkpoint": (distributed, "distributed checkpoint"),
    "an adapter of another model": (adapter(base_model_name_or_path="gpt2"), "adapter_config.json"),
    "an adapter's folder": (lambda source: (source / "adapter_config.json").mkdir(), "adapter_config.json"),
    "an adapter": (lambda source: (source / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "code of a tokenizer": (tokenizer(auto_map={"AutoTokenizer": ["evil.Tok", None]}), "auto_map"),
    "versions of a tokenizer": (
        tokenizer(fast_tokenizer_files=["tokenizer.4.0.0.json"]),
        "fast_tokenizer_files",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", AMBIGUOUS)
@pytest.mark.parametrize("command", ["check", "run"])
def test_what_is_ambiguous_is_refused(
    how: str, command: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "project", tiny_model, text_file)
    spoil, word = AMBIGUOUS[how]
    spoil(project.folder / "model")
    done = cli(*(project.command() if command == "run" else ["check", str(project.recipe)]))
    assert done.code == 2 and word in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(project.out.glob("*/latest"))


@pytest.mark.parametrize("how", ["a distributed checkpoint", "an adapter of another model", "an adapter"])
def test_what_is_ambiguous_on_the_hub_is_downloaded_and_refused(
    how: str, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder, of which the files are taken that huggingface_hub would take."""
    project = make_project(tmp_path / "project", tiny_model, text_file)
    (project.folder / "model").rename(tmp_path / "hub")
    AMBIGUOUS[how][0](tmp_path / "hub")

    def download(name: str, revision: str | None = None, allow_patterns: Sequence[str] = ()) -> str:
        assert name == "some/model"
        (tmp_path / "cache").mkdir()
        names = [file.name for file in (tmp_path / "hub").iterdir()]
        for wanted in filter_repo_objects(names, allow_patterns=list(allow_patterns)):
            shutil.copyfile(tmp_path / "hub" / wanted, tmp_path / "cache" / wanted)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    done = cli(*project.command("--set", "model.source=some/model"))
    assert done.code == 2 and AMBIGUOUS[how][1] in done.stderr, done.stderr


PROCESSORS: dict[str, dict[str, object]] = {
    "another size": {"size": {"height": 8, "width": 8}},
    "another type": {"image_processor_type": "BitImageProcessor"},
    "another mean": {"image_mean": [0.1, 0.2, 0.3]},
    "no normalization": {"do_normalize": False},
}


@pytest.mark.parametrize("how", PROCESSORS)
def test_two_image_processors_are_refused(how: str, tmp_path: Path) -> None:
    source = save_vit(tmp_path / "model")
    steps = json.loads((source / "preprocessor_config.json").read_text())
    whole = source / "processor_config.json"
    whole.write_text(json.dumps({"image_processor": steps}))
    check_reader("vit", source)
    whole.write_text(json.dumps({"image_processor": {**steps, **PROCESSORS[how]}}))
    with pytest.raises(ModelError, match="with another image_processor"):
        check_reader("vit", source)


UNKNOWN: dict[str, dict[str, object]] = {
    "another's": {"image_processor_type": "MyImageProcessor"},
    "misspelled": {"image_processor_type": "ResNetImageProcessors"},
    "without its end": {"image_processor_type": "ViT"},
    "a word of the table": {"image_processor_type": "torchvision"},
    "a base class": {"image_processor_type": "BaseImageProcessor"},
    "empty": {"image_processor_type": ""},
    "a number": {"image_processor_type": 3},
    "a list": {"image_processor_type": ["ViTImageProcessor"]},
    "an extractor": {"image_processor_type": None, "feature_extractor_type": "MyFeatureExtractor"},
    "code": {"auto_map": {"AutoImageProcessor": "p.Mine"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", UNKNOWN)
def test_an_image_processor_that_transformers_lacks_is_refused(how: str, tmp_path: Path) -> None:
    source = save_vit(tmp_path / "model")
    file = source / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **UNKNOWN[how]}))
    with pytest.raises(ModelError, match="which transformers does not know|auto_map") as caught:
        check_reader("vit", source)
    assert len(caught.value.message) < 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ViTImageProcessor", "ViTImageProcessorFast", "ConvNextImageProcessor", "BitImageProcessor"]
)
def test_an_image_processor_that_transformers_has_is_taken(kind: str, tmp_path: Path) -> None:
    source = save_vit(tmp_path / "model")
    file = source / "preprocessor_config.json"
    steps = json.loads(file.read_text())
    file.write_text(json.dumps({**steps, "image_processor_type": kind}))
    check_reader("vit", source)
    del steps["image_processor_type"]
    file.write_text(json.dumps({**steps, "feature_extractor_type": "ViTFeatureExtractor"}))
    check_reader("vit", source)


@pytest.mark.slow
def test_an_index_of_the_single_file_alone_is_one_model(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model, source)
    weight_map = dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert index.name in fingerprint(source) and read_tensors(source).keys() == weight_map.keys()
