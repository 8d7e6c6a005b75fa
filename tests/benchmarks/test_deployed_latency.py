"""Latency in ONNX Runtime of the deployed graphs, beside fp32 and ONNX Runtime's own quantizers.

MiniLM, EfficientNet-Lite0 and MobileNetV2 with their real weights; the shapes of GPT-2 (124 M), ViT-S,
ResNet-50 and EfficientNet-B0 with random ones. Each table is one interleaved run; the least of all rounds
counts. `fp32` is the graph as torch's exporter writes it. Peers: `quantize_dynamic`, `quantize_static` with
its defaults (int8 activations) and with uint8 activations, and the 4-bit quantizer of ONNX Runtime, on the
same fp32 graph.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_deployed_latency.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from gpt2_shapes import make_checkpoint
from lines import environment
from onnx import helper
from onnxruntime import quantization as ort
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

ROUNDS = 25
SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
FP32, OURS, DYNAMIC, STATIC, UNSIGNED, BITS = (
    "fp32", "qcompress", "dynamic", "static", "static uint8", "MatMulNBits"
)  # fmt: skip
Inputs = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def processor() -> None:
    """Print the processor's name and those of its instruction sets that matter."""
    words = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        words[name.strip()] = value.strip()
    flags = [name for name in SETS if name in words.get("flags", "").split()]
    print(f"\n{words.get('model name')}, {', '.join(flags)}; ONNX Runtime {onnxruntime.__version__}")


# Graphs -------------------------------------------------------------------------------------------


def exported(folder: Path, name: str, sections: dict[str, Any], form: Any, target: str = "cpu") -> Path:
    """`model.onnx` of a run until export, `form` a format or `float`."""
    quantized = form != "float"
    recipe = {**sections, "name": name, "format": form, "method": "ptq" if quantized else "float"}
    recipe["build"] = {"target": target, **sections.get("build", {})}
    if not quantized:
        recipe["data"] = {**recipe["data"], "train": recipe["data"]["calibration"]}
        recipe["train"] = {"phases": {"finetune": {"steps": 0}}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "qcompress", "run", str(file), "--until", "export", "--out", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    (graph,) = (folder / name).glob("*/model.onnx")
    return graph


class Samples(ort.CalibrationDataReader):
    """Inputs of ONNX Runtime's calibration."""

    def __init__(self, inputs: list[Inputs]) -> None:
        self._left: Iterator[Inputs] = iter(inputs)

    def get_next(self) -> Inputs | None:
        return next(self._left, None)


def without_shapes(file: Path) -> Path:
    """The graph without declared shapes, with MatMul and Add for Gemm: what ONNX Runtime's tools take."""
    model = onnx.load(file)
    del model.graph.value_info[:]
    nodes = []
    for node in model.graph.node:
        plain = node.op_type == "Gemm" and not any(item.name.startswith("trans") for item in node.attribute)
        if not plain:
            nodes.append(node)
            continue
        product = f"{node.output[0]}/product"
        nodes.append(helper.make_node("MatMul", node.input[:2], [product], node.name))
        nodes.append(helper.make_node("Add", [product, node.input[2]], node.output, f"{node.name}/bias"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    plain_file = file.with_name("plain.onnx")
    onnx.save(model, plain_file)
    return plain_file


def peers(file: Path, folder: Path, samples: list[Inputs], dynamic: bool = False) -> dict[str, Path]:
    """ONNX Runtime's quantized files of an fp32 graph."""
    source = without_shapes(file)
    made = {}
    if dynamic:
        made[DYNAMIC] = folder / "dynamic.onnx"
        ort.quantize_dynamic(source, made[DYNAMIC], per_channel=True, weight_type=ort.QuantType.QInt8)
    for name, kind in ((STATIC, ort.QuantType.QInt8), (UNSIGNED, ort.QuantType.QUInt8)):
        made[name] = folder / f"{name}.onnx"
        ort.quantize_static(source, made[name], Samples(samples), per_channel=True, activation_type=kind)
    return made


# Measurement --------------------------------------------------------------------------------------


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def latencies(files: dict[str, Path], inputs: Callable[[onnxruntime.InferenceSession], Inputs],
              threads: int, rounds: int = ROUNDS) -> dict[str, float]:  # fmt: skip
    """Least seconds of each graph, all of them run in turn."""
    sessions = {name: session(file, threads) for name, file in files.items()}
    fed = {name: inputs(one) for name, one in sessions.items()}
    least = dict.fromkeys(files, float("inf"))
    for _ in range(rounds + 2):
        for name, one in sessions.items():
            began = time.perf_counter()
            one.run(None, fed[name])
            least[name] = min(least[name], time.perf_counter() - began)
    return least


def table(title: str, files: dict[str, Path], inputs: Callable[[onnxruntime.InferenceSession], Inputs],
          rounds: int = ROUNDS) -> dict[str, float]:  # fmt: skip
    """Print milliseconds and ratios to fp32 with one and two threads; returns the ratios with one."""
    by_threads = {threads: latencies(files, inputs, threads, rounds) for threads in (1, 2)}
    ratios = {}
    for name in files:
        cells = []
        for threads, least in by_threads.items():
            ratio = least[name] / least[FP32]
            ratios.setdefault(name, ratio)
            cells.append(f"{threads} thread{'s' * (threads > 1)} {1e3 * least[name]:8.2f} ms {ratio:.3f}")
        print(f"{title:24s} {name:14s} {'   '.join(cells)}   {files[name].stat().st_size / 1e6:7.1f} MB")
    return ratios


def integer_layers(file: Path) -> str:
    """Numbers of layers that run as integer kernels, and of tables that are looked up as codes."""
    kernels = json.loads((file.parent / "sizes.json").read_text())["kernels"]["onnxruntime"]
    products = f"{kernels['integer']} of {kernels['products']} matmuls and convolutions on integers"
    return f"{products}, {kernels['codes']} of {kernels['tables']} tables as codes"


def tokens(batch: int, length: int, past: int = 0) -> Callable[[onnxruntime.InferenceSession], Inputs]:
    """Inputs of an encoder or a decoder, the latter with `past` tokens in the cache."""

    def inputs(one: onnxruntime.InferenceSession) -> Inputs:
        random, made = np.random.default_rng(0), {}
        for item in one.get_inputs():
            if item.name == "input_ids":
                made[item.name] = random.integers(0, 300, (batch, length))
            elif item.name == "attention_mask":
                made[item.name] = np.ones((batch, past + length), np.int64)
            elif item.name == "token_type_ids":
                made[item.name] = np.zeros((batch, length), np.int64)
            elif item.name == "position_ids":
                made[item.name] = np.arange(past, past + length)[None].repeat(batch, 0)
            else:
                shape = (batch, item.shape[1], past, item.shape[3])
                made[item.name] = random.standard_normal(shape, np.float32)
        return made

    return inputs


# Models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> tuple[Path, dict[str, Any]]:
    """MiniLM with a classifier of two classes, and the recipe around it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, source = tmp_path_factory.mktemp("minilm"), assets / "models" / "all-MiniLM-L6-v2"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    cola = assets / "glue" / "CoLA"
    return folder, {
        "model": {"family": "bert", "source": str(folder / "model")},
        "task": {"name": "sequence-classification", "glue": "cola", "context": 64},
        "data": {
            "calibration": {"table": [str(cola / "train.tsv")], "limit": 64},
            "evaluate": {"dev": {"table": [str(cola / "dev.tsv")], "limit": 64}},
        },
        "build": {"profiles": [{"batch": [1, 8, 8], "sequence": [1, 32, 64]}]},
    }


@pytest.mark.benchmark
def test_minilm(minilm: tuple[Path, dict[str, Any]]) -> None:
    folder, sections = minilm
    plain = exported(folder, "fp32", sections, "float", "rtx-ada")
    ours = exported(folder, "w8a8", sections, "w8a8")
    samples = [tokens(4, 32)(session(plain, 1)) for _ in range(4)]
    files = {FP32: plain, OURS: ours, **peers(plain, folder, samples, dynamic=True)}
    print(integer_layers(ours))
    short = table("MiniLM 1 x 32", files, tokens(1, 32), 60)
    long = table("MiniLM 8 x 64", files, tokens(8, 64))
    assert short[OURS] <= 0.43 and long[OURS] <= 0.41
    assert short[OURS] <= min(short[DYNAMIC], short[STATIC]) and long[OURS] <= min(
        long[DYNAMIC], long[STATIC]
    )


@pytest.mark.benchmark
def test_minilm_with_4_bit_weights(minilm: tuple[Path, dict[str, Any]]) -> None:
    folder, sections = minilm
    plain = exported(folder, "fp32-w4", sections, "float", "rtx-ada")
    ours = exported(folder, "w4a16", sections, "w4a16-g32")
    quantizer = MatMulNBitsQuantizer(
        onnx.load(without_shapes(plain)), block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "bits.onnx"))
    files = {FP32: plain, OURS: ours, BITS: folder / "bits.onnx"}
    for batch, length in ((1, 32), (8, 64)):
        ratios = table(f"MiniLM W4A16 {batch} x {length}", files, tokens(batch, length))
        assert ratios[OURS] <= 1.03 * ratios[BITS]


@pytest.mark.benchmark
def test_gpt2(tmp_path: Path, text_file: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", text_file, "124M")
    data = {"text": [str(text_file)]}
    sections = {
        "model": {"family": "gpt2", "source": str(checkpoint)},
        "task": {"name": "causal-lm", "context": 128},
        "data": {"calibration": data | {"limit": 16}, "evaluate": {"test": data | {"limit": 4}}},
        "build": {"profiles": [{"batch": [1, 1, 4], "sequence": [1, 128, 128]}]},
    }
    files = {
        FP32: exported(tmp_path, "fp32", sections, "float", "rtx-ada"),
        OURS: exported(tmp_path, "w8a8", sections, "w8a8"),
        "W4A16": exported(tmp_path, "w4a16", sections, "w4a16-g128"),
    }
    print(integer_layers(files[OURS]))
    prompt = table("GPT-2 124M 1 x 128", files, tokens(1, 128), 10)
    sections["export"] = {"cache": True}
    sections["build"]["profiles"][0]["past"] = [0, 127, 127]
    files = {
        FP32: exported(tmp_path, "fp32-cache", sections, "float", "rtx-ada"),
        OURS: exported(tmp_path, "w8a8-cache", sections, "w8a8"),
        "W4A16": exported(tmp_path, "w4a16-cache", sections, "w4a16-g128"),
    }
    token = table("a token after 512", files, tokens(1, 1, 512))
    assert prompt[OURS] <= 0.37 and token[OURS] <= 0.45


def pictures(folder: Path) -> tuple[Path, np.ndarray]:
    """An archive of 16 random images with structure, and them as inputs [16, 3, 224, 224]."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (16, 14, 14, 3)).repeat(16, 1).repeat(16, 2)
    images = np.clip(coarse + random.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", image=images, label=np.arange(16))
    return folder / "images.npz", images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def image_table(folder: Path, title: str, family: str, source: Path, form: Any) -> dict[str, float]:
    """The table of an image classifier at batch 1."""
    archive, images = pictures(folder)
    data = {"npz": [str(archive)], "columns": {"image": "image", "label": "label"}}
    sections = {
        "model": {"family": family, "source": str(source)},
        "task": {"name": "image-classification"},
        "data": {"calibration": data, "evaluate": {"test": data}},
    }
    plain = exported(folder, "fp32", sections, "float", "rtx-ada")
    ours = exported(folder, "w8a8", sections, form)
    name = session(plain, 1).get_inputs()[0].name
    samples = [{name: images[index : index + 1]} for index in range(8)]
    print(integer_layers(ours))
    files = {FP32: plain, OURS: ours, **peers(plain, folder, samples)}
    return table(title, files, lambda one: {name: images[:1]}, 12)


def random_net(folder: Path, model: torch.nn.Module) -> Path:
    """Save a net with random weights whose batch norms have seen some images, and its preprocessor."""
    _, images = pictures(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.from_numpy(images))
    model.eval().save_pretrained(folder / "model")
    return with_preprocessor(folder / "model")


def with_preprocessor(source: Path) -> Path:
    """Write a checkpoint's preprocessor: 224 x 224 pixels, (x - 127.5) / 127.5."""
    preprocessor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }  # fmt: skip
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return source


LABELS = {"id2label": {index: str(index) for index in range(1000)}}


@pytest.mark.benchmark
def test_vit_small(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **LABELS)
    source = random_net(tmp_path, ViTForImageClassification(config))
    ratios = image_table(tmp_path, "ViT-S", "vit", source, "w8a8")
    assert ratios[OURS] <= min(ratios[STATIC], ratios[UNSIGNED])


@pytest.mark.benchmark
def test_resnet_50(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    source = random_net(tmp_path, ResNetForImageClassification(ResNetConfig(**LABELS)))
    ratios = image_table(tmp_path, "ResNet-50", "resnet", source, {"preset": "w8a8", "residual": "int8"})
    assert ratios[OURS] <= ratios[STATIC]


@pytest.mark.benchmark
def test_efficientnet_lite0(tmp_path: Path, assets: Path) -> None:
    source = assets / "models" / "efficientnet-lite0"
    form = {"preset": "w8a8", "residual": "int8"}
    ratios = image_table(tmp_path, "EfficientNet-Lite0", "efficientnet", source, form)
    assert ratios[OURS] <= min(ratios[STATIC], ratios[UNSIGNED])


@pytest.mark.benchmark
def test_efficientnet_b0(tmp_path: Path) -> None:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        dropout_rate=0.2,
        **LABELS,
    )
    source = random_net(tmp_path, EfficientNetForImageClassification(config))
    form = {"preset": "w8a8", "residual": "int8"}
    ratios = image_table(tmp_path, "EfficientNet-B0", "efficientnet", source, form)
    assert ratios[OURS] <= ratios[STATIC]


@pytest.mark.benchmark
def test_mobilenet_v2(tmp_path: Path, assets: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in (assets / "models" / "mobilenet-v2").iterdir():
        shutil.copyfile(file, source / file.name)
    form = {"preset": "w8a8", "residual": "int8"}
    ratios = image_table(tmp_path, "MobileNetV2", "mobilenet-v2", with_preprocessor(source), form)
    assert ratios[OURS] <= ratios[STATIC]
