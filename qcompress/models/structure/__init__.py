"""Structure of any module, discovered by running it: layers, blocks, norms, attentions, and proven rescaling
sites.

`Structure` is plain values and needs no torch; `discover` imports torch when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcompress.models.structure.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Structure", "discover"]


def discover(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    again: Mapping[str, Tensor] | None = None,
    *,
    sites: bool = True,
    representative: bool = True,
) -> Structure:
    """Discover the structure of a model with weights in fp32, random or trained, and leave it unchanged.

    `inputs`: example arguments of `forward`, by name. `again`: arguments of another length or size, on which
    every site is proven a second time.
    `sites`: False leaves the rescaling sites out, which take most of the time.
    `representative`: search sites in one block of each kind, state them for its like and prove the statements
    in one run. A site that leaves its block is not stated for others. False: search every block.

    A proof holds for what these inputs run. A channel that is zero in all of them is not rescaled, and an
    expert that none of them calls stays float; use inputs of several rows.

    Raises ModelError for a model without a quantizable layer, and whatever `forward` raises.
    """
    from qcompress.models.structure.discovery import discover_structure
    from qcompress.models.structure.running import unchanged

    with unchanged(model):
        return discover_structure(model, inputs, again, sites=sites, representative=representative)
