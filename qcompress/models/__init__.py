"""One file per family, and the only door to transformers. `FAMILIES` is the table of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qcompress.errors import MachineError, ModelError
from qcompress.models import bert, cifar_resnet, distilbert, efficientnet, gpt2, resnet, roberta, vit
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

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

FAMILIES = {
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "vit": vit,
    "resnet": resnet,
    "cifar-resnet": cifar_resnet,
    "efficientnet": efficientnet,
}
"""Family name -> module with `describe`, `task_config`, `load_float`, `empty`, `tie`, `graph_inputs`,
`signature`, `install_points`, and the constants LINEAR_AXIS, CAUSAL, INPUTS, TASKS. DEPTH says where its
blocks are; where they have several shapes it is None, and `shorten` makes a small model."""


PROCESSOR = "preprocessor_config.json"
"""How a checkpoint says what its images are prepared with."""


def describe(
    family: str, directory: Path, head: Head = CAUSAL_LM, blocks: Blocks | None = None
) -> Architecture:
    """The architecture of a checkpoint with a task's head, from config.json and the safetensors header
    alone; with `blocks`, that of a model of these.
    """
    config, tensors, _ = chosen(family, directory, blocks)
    module = FAMILIES[family]
    check_floats(tensors)
    if module.DEPTH is None or SHARED not in config:
        return module.describe(config, tensors, head)
    whole = with_shared(tensors, config, module.DEPTH)
    return share(module.describe(config, whole, head), tensors, config, module.DEPTH)


def chosen(
    family: str, directory: Path, blocks: Blocks | None = None
) -> tuple[dict[str, Any], Tensors, Names]:
    """The config and the tensors of a model of these blocks of a checkpoint, and what the checkpoint's
    tensors are called in it. Raises BlocksError for blocks that it has not.
    """
    config, tensors = read_config(directory), read_tensors(directory)
    depth, renamed = FAMILIES[family].DEPTH, renamed_tensors(family, config, tensors)
    tensors = {renamed.get(name, name): value for name, value in tensors.items()}
    if depth is not None:
        _check_depth(config, tensors, depth, blocks)
    if blocks is None or (depth is not None and type(config.get(depth.key)) is not int):
        return config, tensors, lambda name: renamed.get(name, name)  # `describe` says what is wrong
    if depth is None:
        raise BlocksError(
            f"the blocks of a {family} have several shapes, and none stands for another",
            fix="drop `model.blocks`",
        )
    config, names = choose(config, depth, blocks)
    picked = {new: value for name, value in tensors.items() if (new := names(name))}
    return config, picked, lambda name: names(renamed.get(name, name))


def _check_depth(config: dict[str, Any], tensors: Tensors, depth: Depth, blocks: Blocks | None) -> None:
    """Refuse a checkpoint of more blocks than its config.json counts; a list of blocks that are counted says
    that the others are not wanted.
    """
    count = config.get(depth.key)
    if type(count) is not int or count < 1:
        return  # `describe` says what is wrong
    inside = [(parts[1], name) for name in tensors if (parts := depth.split(name))]
    held, name = max(inside, default=(-1, ""))
    if SHARED not in config and count > max(held + 1, len(tensors)):  # `describe` names what fewer lack
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
    """The names that the family's model has for tensors of a checkpoint that has others: of a wrapper around
    the model (`module.` of DataParallel), or of a tied head that was saved in the place of its table.
    """
    prefix = wrapper_of(tensors)
    renamed = {name: name.removeprefix(prefix) for name in tensors} if prefix else {}
    own = {renamed.get(name, name): name for name in tensors}
    for head, tables in getattr(FAMILIES[family], "TIED", {}).items():
        if config.get("tie_word_embeddings", True) and head in own and not own.keys() & set(tables):
            renamed[own[head]] = tables[0]
    return renamed


def first_blocks(
    family: str, directory: Path, count: int, blocks: Blocks | None = None
) -> tuple[dict[str, Any], Names]:
    """The config of the same model with its first blocks only, as far as that is a model, and the names of
    its tensors; with `blocks`, of a model of these.
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
    """Inputs of the exported graph of a model in a directory. Images have the size that config.json names, or
    else the one that `steps` bring them to (preprocessor_config.json).
    """
    config = read_config(directory)
    if PIXELS in family.INPUTS and "image_size" not in config:
        config |= prepared_size(read_steps(directory) if steps is None else steps)
    return family.signature(config)


def read_steps(directory: Path) -> dict[str, Any]:
    """The checkpoint's preprocessor_config.json; empty without one."""
    file = directory / PROCESSOR
    return read_object(file) if file.exists() else {}


def prepared_size(steps: dict[str, Any]) -> dict[str, list[int]]:
    """The `image_size` that preprocessing ends with; empty where it leaves images as they are."""
    names = [
        name for name, step in (("crop_size", "do_center_crop"), ("size", "do_resize")) if steps.get(step)
    ]
    size = next((steps[name] for name in names if steps.get(name)), None)
    if isinstance(size, int):
        return {"image_size": [size, size]}
    if not isinstance(size, dict):
        return {}
    side = size.get("shortest_edge")
    found = [size.get("height", side), size.get("width", side)]
    return {"image_size": found} if all(type(one) is int for one in found) else {}


TOKENIZER_AGAIN = "copy the tokenizer's files again from the checkpoint"


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, from local files, without running code of the checkpoint."""
    from transformers import AutoTokenizer

    with reading(directory, "transformers makes no tokenizer of its files", TOKENIZER_AGAIN):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_processor(directory: Path) -> BaseImageProcessor:
    """The image processor of a checkpoint, from local files, without running code of the checkpoint.

    Always the one on Pillow: torchvision's, which transformers prefers where it is installed, resizes to
    other pixels, and a run must not depend on what else is installed. Raises ModelError where there is no
    preprocessor_config.json, or none that transformers knows; MachineError without Pillow.
    """
    from transformers import AutoImageProcessor, logging
    from transformers.utils import is_vision_available

    if not is_vision_available():
        raise MachineError("reading images needs Pillow", fix="pip install 'qcompress[train]'")
    if not (directory / PROCESSOR).is_file():
        raise ModelError(
            f"{directory} holds no {PROCESSOR}, which says how images are prepared",
            fix="copy it beside the checkpoint, or write `mean`, `std` and `size` under `task`",
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it says that torchvision is not installed
    mend = "mend the file, or write `mean`, `std` and `size` under `task`"
    try:
        with reading(directory / PROCESSOR, "it gives no image processor that transformers knows", mend):
            return AutoImageProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except ImportError as error:
        raise ModelError(
            f"{directory / PROCESSOR} gives no image processor that transformers can import ({error})",
            fix=mend,
        ) from None
    finally:
        logging.set_verbosity(verbosity)
