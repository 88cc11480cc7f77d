"""What `engine.evaluate` found, as JSON, as a Markdown table and as the points of a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.compare import Comparison
from weights.bits import Bits


@dataclass(frozen=True)
class Row:
    """One model of a run."""

    model: str  # as it was named
    bits: Bits | None  # asked of its conversion; None: by default, or converted before
    source: str  # name of the model that was converted
    reference: str
    text: str
    window: int
    activations: str  # "int8" or "exact"
    bits_per_weight_blocks: float  # stored, over the matrices of the blocks
    bits_per_weight_file: float  # stored, over all matrices
    file_bytes: int
    against_reference: Comparison
    int8_against_exact: Comparison | None  # of the same weights

    @property
    def name(self) -> str:
        if self.bits is None:
            return self.model
        return f"{self.model} {self.bits if self.bits == 'lossless' else format(self.bits, 'g')}"


def as_json(row: Row) -> str:
    """One line."""
    facts = dataclasses.asdict(row)
    facts |= facts.pop("against_reference")
    if activations := facts.pop("int8_against_exact"):
        facts["kl_activations"] = activations["kl_mean"]
        facts["kl_activations_standard_error"] = activations["kl_standard_error"]
    return json.dumps(facts)


def as_markdown(rows: Sequence[Row]) -> str:
    """Of at least one row; all of them of the same run."""
    first = rows[0]
    names = [
        "model",
        "bit/weight, blocks",
        "in all",
        "file MiB",
        "KL",
        "KL, 99th percentile",
        "same best token",
        f"perplexity (reference {first.against_reference.reference_perplexity:.3f})",
    ]
    if first.int8_against_exact is not None:
        names.append("KL of int8 activations alone")
    lines = [
        f"{Path(first.text).name}, {first.against_reference.tokens} tokens in windows of "
        f"{first.window}, {first.activations} activations; KL({first.reference} || model) in nats, "
        "± its standard error",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for row in rows:
        result = row.against_reference
        cells = [
            row.name,
            f"{row.bits_per_weight_blocks:.3f}",
            f"{row.bits_per_weight_file:.3f}",
            f"{row.file_bytes / 2**20:.1f}",
            _kl(result),
            f"{result.kl_p99:.3g}",
            f"{100 * result.top1_agreement:.2f} %",
            f"{result.perplexity:.3f}",
        ]
        if row.int8_against_exact is not None:
            cells.append(_kl(row.int8_against_exact))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _kl(result: Comparison) -> str:
    error = result.kl_standard_error
    return f"{result.kl_mean:.4g}" + ("" if error is None else f" ± {error:.2g}")
