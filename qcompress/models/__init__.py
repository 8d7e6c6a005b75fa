"""Model families, one file each; the only room that imports transformers. `FAMILIES` is their table."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from qcompress.errors import MachineError, ModelError
from qcompress.models import (  # noqa: F401
    any_model,
    bert,
    cifar_resnet,
    decoder,
    distilbert,
    efficientnet,
    gpt2,
    image_model,
    mobilenet_v2,
    resnet,
    roberta,
    text_model,
    vit,
)
from qcompress.models.architecture import (
    CAUSAL_LM,
    PIXELS,
    Architecture,
    Head,
    Input,
)
from qcompress.models.checkpoint_files import read_config, read_object, read_tensors, wrapper_of
from qcompress.models.config_values import check_floats
from qcompress.models.layer_selection import (
    SHARED,
    Blocks,
    BlocksError,
    Depth,
    Names,
    Tensors,
    choose,
    share,
    with_shared,
)
from qcompress.models.loading import reading
from qcompress.models.pooling import settled_head
from qcompress.models.python_source import made_folder, refuse_code
from qcompress.schema.families import Family

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

FAMILIES: dict[str, ModuleType] = {name: globals()[name.replace("-", "_")] for name in get_args(Family)}
"""Family name -> module with `describe`, `task_config`, `load_float`, `empty`, `tie`, `graph_inputs`,
`signature`, `install_points`, and the constants CAUSAL, INPUTS, TASKS. DEPTH locates its blocks;
it is None if they have several shapes, and then `shorten` makes a small model.
"""


PROCESSOR = "preprocessor_config.json"
"""File with a checkpoint's image preprocessing."""


def describe(
    family: str, directory: Path, head: Head = CAUSAL_LM, blocks: Blocks | None = None
) -> Architecture:
    """Architecture of a checkpoint with a task's head, from config.json and the safetensors header alone;
    `blocks` selects blocks of the checkpoint.
    """
    config, tensors, _ = chosen(family, directory, blocks)
    head = settled_head(head, directory, config)
    module = FAMILIES[family]
    check_floats(tensors)
    if module.DEPTH is None or SHARED not in config:
        return module.describe(config, tensors, head)
    whole = with_shared(tensors, config, module.DEPTH)
    return share(module.describe(config, whole, head), tensors, config, module.DEPTH)


def chosen(
    family: str, directory: Path, blocks: Blocks | None = None
) -> tuple[dict[str, Any], Tensors, Names]:
    """Config and tensors of a model with the selected blocks of a checkpoint, and a function from the
    checkpoint's tensor names to the model's. Raises BlocksError for a block that the checkpoint does not
    have.
    """
    config, tensors = read_config(directory), read_tensors(directory)
    if directory.parent != made_folder():
        refuse_code(directory, config)
    depth, renamed = FAMILIES[family].DEPTH, renamed_tensors(family, config, tensors)
    tensors = {renamed.get(name, name): value for name, value in tensors.items()}
    if depth is not None:
        _check_depth(config, tensors, depth, blocks)
    if blocks is None or (depth is not None and type(config.get(depth.key)) is not int):
        return config, tensors, lambda name: renamed.get(name, name)  # `describe` reports a wrong count
    if depth is None:
        raise BlocksError(
            f"the blocks of a {family} have several shapes, and cannot replace each other",
            fix="drop `model.blocks`",
        )
    config, names = choose(config, depth, blocks)
    picked = {new: value for name, value in tensors.items() if (new := names(name))}
    return config, picked, lambda name: names(renamed.get(name, name))


def _check_depth(config: dict[str, Any], tensors: Tensors, depth: Depth, blocks: Blocks | None) -> None:
    """Refuse a checkpoint with more blocks than its config.json counts, unless `blocks` lists counted
    blocks only.
    """
    count = config.get(depth.key)
    if type(count) is not int or count < 1:
        return  # `describe` reports a wrong count
    inside = [(parts[1], name) for name in tensors if (parts := depth.split(name))]
    held, name = max(inside, default=(-1, ""))
    if SHARED not in config and count > max(held + 1, len(tensors)):  # `describe` names missing tensors
        raise ModelError(
            f"config.json says {depth.key} {count}, and the checkpoint has {held + 1} blocks (no such tensor "
            f"as those of block {held + 1})",
            fix="take config.json and model.safetensors from the same checkpoint",
        )
    listed = blocks is not None and not isinstance(blocks, str)
    if held < count or (listed and all(number < count for number in blocks)):
        return
    raise ModelError(
        f"config.json says {depth.key} {count}, and the checkpoint has {held + 1} blocks, such as the one of "
        f"{name}",
        fix=f'write "{depth.key}": {held + 1} into config.json; `model.blocks` of a recipe keeps fewer',
    )


def renamed_tensors(family: str, config: dict[str, Any], tensors: Tensors) -> dict[str, str]:
    """Map of checkpoint tensor names to the model's where they differ: names with a wrapper's prefix
    (`module.` of DataParallel), and a tied head that was saved in place of its table.
    """
    prefix = wrapper_of(tensors)
    renamed = {name: name.removeprefix(prefix) for name in tensors} if prefix else {}
    by_name = {renamed.get(name, name): name for name in tensors}
    for head, tables in getattr(FAMILIES[family], "TIED", {}).items():
        if config.get("tie_word_embeddings", True) and head in by_name and not by_name.keys() & set(tables):
            renamed[by_name[head]] = tables[0]
    return renamed


def first_blocks(
    family: str, directory: Path, count: int, blocks: Blocks | None = None
) -> tuple[dict[str, Any], Names]:
    """Config and tensor names of a model with the first blocks only (at least one of each shape); `blocks`
    selects blocks of the checkpoint before.
    """
    config, _, names = chosen(family, directory, blocks)
    module = FAMILIES[family]
    if module.DEPTH is None:
        return module.shorten(config, count)
    config, then = choose(config, module.DEPTH, range(min(count, config[module.DEPTH.key])))
    return config, lambda name: then(new) if (new := names(name)) else None


def graph_signature(
    family: ModuleType, directory: Path, steps: dict[str, Any] | None = None
) -> tuple[Input, ...]:
    """Inputs of the exported graph of a model in a directory. The size of images comes from config.json, or
    else from the preprocessing `steps` (preprocessor_config.json).
    """
    config = read_config(directory)
    if PIXELS in family.INPUTS and "image_size" not in config:
        config |= prepared_size(read_steps(directory) if steps is None else steps)
    return family.signature(config)


def read_steps(directory: Path) -> dict[str, Any]:
    """Read the checkpoint's preprocessor_config.json; empty without one."""
    file = directory / PROCESSOR
    return read_object(file) if file.exists() else {}


def prepared_size(steps: dict[str, Any]) -> dict[str, list[int]]:
    """`image_size` after preprocessing; empty if preprocessing keeps the size."""
    names = [
        name for name, step in (("crop_size", "do_center_crop"), ("size", "do_resize")) if steps.get(step)
    ]
    size = next((steps[name] for name in names if steps.get(name)), None)
    if isinstance(size, int):
        return {"image_size": [size, size]}
    if not isinstance(size, dict):
        return {}
    side = size.get("shortest_edge")
    pair = [size.get("height", side), size.get("width", side)]
    return {"image_size": pair} if all(type(side) is int for side in pair) else {}


TOKENIZER_AGAIN = "copy the tokenizer's files again from the checkpoint"


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint from local files, without running code of the checkpoint."""
    from transformers import AutoTokenizer

    with reading(directory, "transformers cannot make a tokenizer from its files", TOKENIZER_AGAIN):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_processor(directory: Path) -> BaseImageProcessor:
    """Load the image processor of a checkpoint from local files, without running code of the checkpoint.

    Always uses the Pillow backend: torchvision's, which transformers prefers if it is installed, resizes to
    other pixels, and a run must not depend on other installed packages. Raises ModelError without a
    preprocessor_config.json, or with one that transformers does not know; MachineError without Pillow.
    """
    from transformers import AutoImageProcessor, logging
    from transformers.utils import is_vision_available

    if not is_vision_available():
        raise MachineError("reading images needs Pillow", fix="pip install 'qcompress[train]'")
    if not (directory / PROCESSOR).is_file():
        raise ModelError(
            f"{directory} holds no {PROCESSOR}, the file with the preprocessing of images",
            fix="copy it beside the checkpoint, or write `mean`, `std` and `size` under `task`",
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that torchvision is not installed
    mend = "mend the file, or write `mean`, `std` and `size` under `task`"
    try:
        with reading(directory / PROCESSOR, "transformers cannot make an image processor from it", mend):
            return AutoImageProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except ImportError as error:
        raise ModelError(
            f"{directory / PROCESSOR} names an image processor that transformers cannot import ({error})",
            fix=mend,
        ) from None
    finally:
        logging.set_verbosity(verbosity)
