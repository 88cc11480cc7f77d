"""The launches of a block beside its products, one kernel each: passes of short texts, of prompts
and of rows (model/llama.py, prompt.py, rows.py) record them alike, with buffers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.device import Device
from engine.kernel import Dispatch, Kernels
from model.activations import Activations, Output
from model.config import ModelConfig
from model.kv_cache import half_padded

if TYPE_CHECKING:
    from model.llama import Llama

_NORM_MOST_LANES = 1024  # of rms_norm on a GPU
NORM_LANES = 128  # of norm_shares


class AttentionCut(NamedTuple):
    """How attention to a cache is cut up: its kernel, workgroups of a token and split, most splits,
    and the overrides that say so.
    """

    kernel: str
    groups: int
    n_splits: int
    overrides: Mapping[str, int]

    @classmethod
    def of(cls, c: ModelConfig, device: Device) -> AttentionCut:
        """For an adapter."""
        if device.software:
            # Every workgroup costs, and a few fill the cores. A CPU goes through every lane's code,
            # idle or not: few lanes, and q loaded once for four positions.
            value_lanes = -(-c.head_dim // 4 // 8) * 8
            return cls("attention", c.n_heads, 1, dict(lanes=max(16, value_lanes), per_lane=4))
        if half_padded(c) > 128 or device.workgroup_memory < 1 << 15:
            return cls("attention", c.n_heads, 16, dict(lanes=256, per_lane=1))
        return cls.grouped(c.n_heads // c.n_kv_heads, c.n_kv_heads, half_padded(c) // 4)

    @classmethod
    def grouped(cls, heads_per_kv: int, n_kv_heads: int, half_quads: int) -> AttentionCut:
        """By shaders/attention_group.wgsl, for heads of up to 256 and 32 KiB of workgroup memory.

        Heads that share a kv head, by up to four; up to some 256 positions nothing to join.
        """
        groups = -(-heads_per_kv // 4)
        lanes = min(256, 32 * half_quads)
        alone = max(1, 256 // (4 * (lanes // half_quads)))
        overrides = dict(lanes=lanes, heads=-(-heads_per_kv // groups), alone=alone)
        return cls("attention_group", n_kv_heads * groups, 32, overrides)


class Operations:
    """Of one model. `tokens` are those that get workgroups, `room` is for how many a split of y has
    room, where these are more.
    """

    def __init__(self, model: Llama) -> None:
        self._model, self._config = model, model.config
        self._kernels: Kernels = model.kernels

    def rms_norm(
        self,
        tokens: int,
        y: Output,
        weight: Any,
        *,
        state: Any,
        x: Any,
        out: Activations,
        room: int | None = None,
        last: bool = False,
    ) -> Dispatch:
        """x += y, of which there may be no split, and out = norm(x); with `last` of the pass's last
        token alone.
        """
        c, m = self._config, self._model
        lanes = m.lanes
        if not m.device.software:  # a quad each, if there are so many
            lanes = min(m.device.max_workgroup_lanes, -(-c.dim // 128) * 32, _NORM_MOST_LANES)
        kernel = self._kernels.get(
            "rms_norm", lanes=lanes, digits=m.digits, dim=c.dim, splits=y.splits
        )
        return kernel.dispatch(
            [1, tokens],
            constants=dict(tokens=room or tokens, last=int(last), eps=c.norm_eps),
            state=state,
            y=y.buffer,
            weight=weight,
            x=x,
            x_digits=out.digits,
            x_scale=out.scale,
        )

    def norm_shares(self, y: Output, weight: Any, *, x: Any, out: Activations) -> Dispatch:
        """rms_norm of one token whose factor is left to the matvec that reads `out`."""
        dim = self._config.dim
        kernel = self._kernels.get(
            "norm_shares", lanes=NORM_LANES, digits=self._model.digits, dim=dim, splits=y.splits
        )
        return kernel.dispatch(
            [-(-(-(-dim // 32) * 8) // NORM_LANES)],
            y=y.buffer,
            weight=weight,
            x=x,
            x_digits=out.digits,
            x_scale=out.scale,
            squares=out.squares,
        )

    def qkv_heads(
        self, tokens: int, y: Output, weights: Any, *, out: Any, room: int | None = None
    ) -> Dispatch:
        """Biases and head norms of q, k and v."""
        c = self._config
        kernel = self._kernels.get(
            "qkv_heads", biased=c.qkv_bias, normed=c.qk_norm, splits=y.splits, lanes=32
        )
        return kernel.dispatch(
            [c.n_heads + 2 * c.n_kv_heads, tokens],
            constants=dict(
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
                tokens=room or tokens,
                eps=c.norm_eps,
            ),
            y=y.buffer,
            weights=weights,
            out=out,
        )

    def attention(
        self,
        tokens: int,
        layer: int,
        qkv: Output,
        *,
        state: Any,
        partial: Any,
        arrived: Any,
        out: Activations,
        n_splits: int,
        room: int | None = None,
        pass_rows: Any = None,
        blocks: Any = None,
        blocks_per_table: int = 0,
    ) -> Dispatch:
        """With `pass_rows` and `blocks` of rows with places of their own, else of one sequence."""
        c, m = self._config, self._model
        cut = m.attention_cut
        batched = pass_rows is not None
        kernel = self._kernels.get(
            cut.kernel,
            **cut.overrides,
            **m.cache.overrides,
            splits=qkv.splits,
            window=c.window(layer) or 0,
            n_splits=n_splits,
            finish=m.finishes_heads,
            digits=m.digits,
            batched=batched,
            paged=batched,
        )
        return kernel.dispatch(
            [n_splits, cut.groups, tokens],
            constants=dict(
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
                max_pos=m.cache.max_pos,
                tokens=room or tokens,
                blocks_per_table=blocks_per_table,
                scale=c.score_scale,
            ),
            state=state,
            pass_rows=pass_rows if batched else state,  # else neither this nor the next is read
            blocks=blocks if batched else state,
            y=qkv.buffer,
            rope=m.turns(layer),
            k_cache=m.cache.keys[layer],
            v_cache=m.cache.values[layer],
            partial=partial,
            arrived=arrived,
            x_digits=out.digits,
            x_scale=out.scale,
        )

    def attention_combine(
        self, tokens: int, *, partial: Any, out: Activations, n_splits: int
    ) -> Dispatch:
        """What attention has left in splits."""
        c, m = self._config, self._model
        n_blocks = -(-c.q_dim // 32)
        kernel = self._kernels.get(
            "attention_combine",
            lanes=m.lanes,
            digits=m.digits,
            n_splits=n_splits,
            half_quads=half_padded(c) // 4,
        )
        return kernel.dispatch(
            [-(-n_blocks * 8 // m.lanes), tokens],
            constants=dict(
                n_heads=c.n_heads,
                head_dim=c.head_dim,
                n_blocks=n_blocks,
            ),
            partial=partial,
            x_digits=out.digits,
            x_scale=out.scale,
        )

    def swiglu(
        self, tokens: int, y: Output, *, out: Activations, room: int | None = None
    ) -> Dispatch:
        c, m = self._config, self._model
        n_blocks = -(-c.hidden_dim // 32)
        kernel = self._kernels.get("swiglu", lanes=m.lanes, digits=m.digits, splits=y.splits)
        return kernel.dispatch(
            [-(-n_blocks * 8 // m.lanes), tokens],
            constants=dict(hidden_dim=c.hidden_dim, n_blocks=n_blocks, tokens=room or tokens),
            y=y.buffer,
            x_digits=out.digits,
            x_scale=out.scale,
        )
