"""``--to hf``: an ordinary Hugging Face folder in a stock architecture, for transformers and vLLM (``stock.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from moesmith.export.stock.write import Layout, stock_reference, stock_refusal, write_stock
from moesmith.export.target import Options, Source, Target, stock_losses
from moesmith.export.verify import verify_folder


class HuggingFace(Target):
    """Mixtral, Qwen2-MoE or Qwen3-MoE, whichever holds the parent's attention."""

    name, takes, suffix = "hf", frozenset({"untie", "shard_bytes"}), ""

    def explain(self, source: Source) -> str | None:
        """Name what no stock architecture holds."""
        refusal = stock_refusal(source.parent, source.carving)
        return refusal[0] if refusal else None

    def lost(self, source: Source, options: Options | None) -> list[str]:
        """List masks by token, exact biases."""
        return stock_losses(source)

    def write(self, source: Source, out: Path, options: Options) -> dict[str, Any]:
        """Write the folder in the parent's dtype; see :func:`stock.write_stock`."""
        layout = Layout(untied=options.untie, shard_bytes=options.shard_bytes)
        return write_stock(source.parent, source.carving, out, source.parent.model.dtype, layout)

    def verify(self, source: Source, out: Path, ids: Tensor) -> dict[str, Any]:
        """Compare logits in transformers."""
        return verify_folder(source.parent, out, stock_reference(source.parent, source.carving), ids)
