"""Writers of other systems' routing records, from their documented layouts; they share no code with the adapters.

`python -m tests.unit.replay_wire` rewrites tests/data/replay/*.json, the golden fixtures. The routing is one in all:
6 tokens, decoder layers 0 to 3 of which 1 and 3 are MoE, 8 (or 300) experts, top-2; the last token was never run.
"""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "data/replay"
MOE_LAYERS = (1, 3)
TOKENS = 6
TOP_K = 2


def expert(row: int, layer: int, slot: int, experts: int) -> int:
    """Distinct in a row, different in every row and layer; spreads over all experts."""
    return (row * 3 + layer * 2 + slot * (experts // 2 + 1)) % experts


def moe_rows(rows: range, experts: int) -> list[list[list[int]]]:
    """[rows][MoE layer][slot]."""
    return [[[expert(r, layer, k, experts) for k in range(TOP_K)] for layer in MOE_LAYERS] for r in rows]


def decoder_rows(rows: range, experts: int) -> list[list[list[int]]]:
    """[rows][decoder layer][slot], dense layers zero."""
    return [
        [[expert(r, n, k, experts) if n in MOE_LAYERS else 0 for k in range(TOP_K)] for n in range(4)] for r in rows
    ]


def pack(values: Any, code: str) -> str:
    """Base64 of the flattened integers, little-endian, `struct` code."""
    flat = values
    while flat and isinstance(flat[0], list):
        flat = [item for part in flat for item in part]
    return base64.b64encode(struct.pack(f"<{len(flat)}{code}", *flat)).decode()


RUN = range(TOKENS - 1)


def fixtures() -> dict[str, Any]:
    """File name -> content."""
    return {
        # sgl-project/sglang#12162: meta_info, flat int32 of all decoder layers
        "sglang_int32": {"routed_experts": pack(decoder_rows(RUN, 8), "i")},
        # #24851: a later turn returns the rows from routed_experts_start_len on
        "sglang_start": {"routed_experts": pack(decoder_rows(range(3, 5), 8), "i")},
        # #31219: narrow dtypes on the wire
        "sglang_uint8": {"routed_experts": pack(decoder_rows(RUN, 8), "B"), "routed_experts_dtype": "uint8"},
        "sglang_uint16": {"routed_experts": pack(decoder_rows(RUN, 300), "H"), "routed_experts_dtype": "uint16"},
        # #17434: a choice of the OpenAI endpoints
        "sglang_openai": {"index": 0, "sgl_ext": {"routed_experts": pack(decoder_rows(RUN, 8), "i")}},
        # skip_tokenizer_init: not encoded
        "sglang_tensor": {"routed_experts": decoder_rows(RUN, 8)},
        # vllm-project/vllm#28284, 0.14 to 0.20: one array, all decoder layers
        "vllm_0_14": {"routed_experts": decoder_rows(RUN, 8)},
        # 0.21: prompt and output apart, MoE layers only
        "vllm_0_21": {
            "prompt_routed_experts": moe_rows(range(4), 8),
            "routed_experts": moe_rows(range(4, 5), 8),
        },
        # 0.22: one array, MoE layers only
        "vllm_0_22": {"routed_experts": moe_rows(RUN, 8)},
        # #56402: rows of a known prefix are left out
        "vllm_tail": {"routed_experts": moe_rows(range(3, 5), 8)},
        # transformers 5.x TopKRouter: (router_logits [T, E], weights [T, K], indices [T, K]) of each MoE layer; a
        # prefill of 4 tokens, then a decoding step
        "transformers": [
            [{"indices": [row[layer] for row in moe_rows(rows, 8)]} for layer in range(2)]
            for rows in (range(4), range(4, 5))
        ],
        # megatron/core/transformer/moe/router_replay.py: a list per router, [T, K]
        "megatron_recorded": [[row[layer] for row in moe_rows(RUN, 8)] for layer in range(2)],
        # megatron/core/inference/inference_request.py: [total_tokens-1, L, K]
        "megatron_inference": {"moe_topk_indices": moe_rows(RUN, 8)},
        # prime-rl: the dtype follows from the largest id of the sample
        "prime_rl_uint8": {"data": pack(moe_rows(RUN, 8), "B"), "shape": [5, 2, 2], "start": 0, "dtype": "uint8"},
        "prime_rl_uint16": {"data": pack(moe_rows(RUN, 300), "H"), "shape": [5, 2, 2], "start": 0, "dtype": "uint16"},
        "prime_rl_padded": {
            "data": pack([*moe_rows(RUN, 8), [[0, 0], [0, 0]]], "B"), "shape": [6, 2, 2], "start": 0, "dtype": "uint8",
        },
        # NeMo-RL: nrlre1:<dtype>:<S>x<L>x<K>:<base64>, -1 rows
        "nemo_rl_int8": f"nrlre1:int8:6x2x2:{pack([*moe_rows(RUN, 8), [[-1, -1], [-1, -1]]], 'b')}",
        "nemo_rl_int16": f"nrlre1:int16:5x2x2:{pack(moe_rows(RUN, 300), 'h')}",
    }  # fmt: skip


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in fixtures().items():
        (FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n")
